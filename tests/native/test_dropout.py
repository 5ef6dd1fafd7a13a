"""Dropout's mask against an independent Philox4x32-7, and what attention does with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_oracle import checked, make_arguments, run_with_gradients
from fused_mha.backends.arguments import arguments_of
from fused_mha.backends.cpu import LIBRARY
from fused_mha.ops import fallback, schema
from fused_mha.testing.tolerances import tolerance
from native.dense_oracle import assert_matches_dense, drawn_seed, native_attention
from native.philox import drawn_probability, kept, philox4x32, random_bits

from search import examples

PER_HEAD = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
NEAR_NOTHING_OR_EVERYTHING = [1e-6, 2e-5, 0.999, 0.99999, 0.9999999]  # rounded to 2^-16, off by up to all
SEEDS = [(0, 0), (1, 2), (-1, -1), (-(2**63), 2**63 - 1), (0x0123456789ABCDEF, 0x7EDCBA9876543210), (2**32, 2**32)]

each_seed = pytest.mark.parametrize("seed", SEEDS, ids=str)


def drawn(seed, shape, p):
    return torch.ops.fused_mha.dropout_mask(torch.tensor(seed), shape, p)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 7
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_the_oracle_gives_the_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_the_mask_holds_the_known_answer(base_isa):
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)  # counter 0, key 0
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for t, half in enumerate(halves):  # the least probability that drops element t, and the one below
        for threshold, is_kept in ((half, True), (half + 1, False)):
            assert bool(drawn((0, 0), (1, 1, 1, 8), threshold / 65536)[0, 0, 0, t]) == is_kept


@each_seed
def test_the_mask_is_philoxs(base_isa, seed):
    shape = (2, 3, 5, 150)
    for p in (0.0, 1e-6, 1 / 65536, 0.1, 0.5, 0.9, 1 - 1 / 65536, 0.9999999, 1.0):
        assert np.array_equal(drawn(seed, shape, p).numpy(), kept(seed, shape, p)), p


@settings(max_examples=examples(30))
@given(
    seed=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 20), st.integers(0, 300)),
    p=st.floats(0.0, 1.0),
)
def test_any_mask_is_philoxs(base_isa, seed, shape, p):
    if abs(p * 65536 % 1 - 0.5) < 1e-9:
        p = 0.25  # a half rounds either way
    assert np.array_equal(drawn(seed, shape, p).numpy(), kept(seed, shape, p))


@each_seed
def test_devices_without_kernels_draw_the_same_mask(seed):
    shape = (2, 3, 5, 43)
    mask = fallback._dropout_mask(torch.tensor(seed), shape, 0.3)
    assert np.array_equal(mask.numpy(), kept(seed, shape, 0.3))


@pytest.mark.parametrize("p", [0.0, 1.0, 0.3])
def test_masks_of_no_heads_rows_or_keys(base_isa, p):
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        assert drawn((1, 2), shape, p).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("virtual", [{}, {"bias_kv": True, "add_zero_attn": True}], ids=["", "virtual keys"])
@pytest.mark.parametrize("band", [{}, {"is_causal": True}, {"padding_dtype": torch.bool}], ids=str)
@pytest.mark.parametrize(("L", "S"), [(3, 300), (45, 67), (45, 3), (1, 1)])
def test_attention_drops_exactly_the_weights_of_the_mask(isa, L, S, band, virtual, dtype):
    arguments = make_arguments(L=L, S=S, D=8, scale=0.1, dtype=dtype, **virtual, **band, **PER_HEAD)
    with drawn_seed(11, -12):
        dropped = native_attention(**arguments, dropout_p=0.4)
    plain = native_attention(**arguments)
    keep = torch.from_numpy(kept((11, -12), plain.weights.shape, 0.4))
    assert torch.equal(dropped.weights != 0, keep & (plain.weights != 0))
    assert torch.equal(dropped.lse, plain.lse)
    expected = plain.weights.double() * keep / (1 - drawn_probability(0.4))
    bound = tolerance(dtype, 0.0, expected.max().item())
    assert (dropped.weights.double() - expected).abs().max().item() <= bound


@pytest.mark.parametrize("p", NEAR_NOTHING_OR_EVERYTHING)
def test_dropout_changes_no_mean(base_isa, p):
    arguments = make_arguments(N=1, L=64, S=2048, H=4, H_kv=4, D=4, scale=0.1, **PER_HEAD)
    plain = native_attention(**arguments).weights
    with drawn_seed(11, -12):
        dropped = native_attention(**arguments, dropout_p=p).weights
    bits, keep = random_bits((11, -12), plain.shape), (dropped != 0).numpy()
    least_that_keeps = int(bits[keep].min())
    assert np.array_equal(keep, bits >= least_that_keeps)
    mean = dropped.double() * (65536 - least_that_keeps) / 65536  # each of the 65,536 values is drawn as often
    bound = tolerance(torch.float32, 0.0, plain.max().item())
    assert (mean - plain)[dropped != 0].abs().max().item() <= bound


@pytest.mark.parametrize("p", NEAR_NOTHING_OR_EVERYTHING)
def test_results_and_gradients_are_scaled_by_what_is_kept(base_isa, p):
    arguments = make_arguments(N=1, L=33, S=2048, H=2, H_kv=2, D=4, D_v=4, dropout_p=p, **PER_HEAD)
    with drawn_seed(11, -12):
        assert_matches_dense(arguments, torch.from_numpy(kept((11, -12), (1, 2, 33, 2048), p)))


@pytest.mark.parametrize("p", NEAR_NOTHING_OR_EVERYTHING)
def test_a_draw_is_replayed_with_the_same_scale(p):
    arguments = make_arguments(N=1, L=33, S=2048, H=2, H_kv=2, D=4, dtype=torch.float64, dropout_p=p)
    with drawn_seed(11, -12):
        drawn = arguments_of(checked(**arguments))
    (output, *_), (replayed, *_) = schema.attention(*drawn), fallback.reference_attention(drawn)
    bound = tolerance(torch.float64, 0.0, output.abs().max().item(), terms=2048)
    assert (replayed - output).abs().max().item() <= bound


def test_the_backward_drops_the_same_weights(base_isa):
    arguments = make_arguments(N=2, L=45, S=67, H=3, H_kv=3, D=8, D_v=67, dropout_p=0.4)
    arguments["value"] = torch.eye(67)[None, :, None].expand(2, -1, 3, -1).contiguous()  # output = weights
    with drawn_seed(11, -12):
        results = run_with_gradients(native_attention, arguments)
    keep = torch.from_numpy(kept((11, -12), (2, 3, 45, 67), 0.4))
    weights = results["output"].transpose(1, 2)
    assert torch.equal(weights != 0, keep)
    leaf = arguments["value"].clone().requires_grad_()
    for i in (0, 13, 44):  # dV of one query is its row of the weights
        with drawn_seed(11, -12):
            output = native_attention(**arguments | {"value": leaf}).output
        cotangent = torch.zeros_like(output)
        cotangent[:, i, :, 0] = 1.0
        (gradient,) = torch.autograd.grad(output, leaf, cotangent)
        assert torch.equal(gradient[..., 0].transpose(1, 2) != 0, keep[:, :, i])


@pytest.mark.parametrize("shape", [{"L": 3, "S": 40}, {"L": 60, "S": 300}], ids=str)
def test_the_mask_of_an_element_does_not_depend_on_the_size_of_the_call(base_isa, shape):
    large = make_arguments(N=2, H=4, H_kv=4, L=60, S=300, D=8, dropout_p=0.5, scale=0.0, **PER_HEAD)
    small = dict(large)
    small["query"] = large["query"][:1, : shape["L"]]
    small["key"], small["value"] = (large[name][:1, : shape["S"]] for name in ("key", "value"))
    with drawn_seed(7, 8):
        weights = [native_attention(**arguments).weights for arguments in (small, large)]
    assert torch.equal(weights[0] != 0, weights[1][:1, :, : shape["L"], : shape["S"]] != 0)


@pytest.mark.parametrize(("L", "S"), [(45, 67), (45, 3), (1, 70)])
def test_a_part_of_a_longer_call_drops_its_part_of_the_mask(base_isa, L, S):
    longer = torch.from_numpy(kept((11, -12), (2, 5, 40 + L, 64 + S), 0.4))
    keep = longer[:, 3:, 40:, 64:]
    seed = schema.placed_seed(torch.tensor((11, -12)), first_query=40, first_key=64, first_head=3, heads=5)
    assert torch.equal(torch.ops.fused_mha.dropout_mask(seed, keep.shape, 0.4), keep)
    assert torch.equal(fallback._dropout_mask(seed, keep.shape, 0.4), keep)
    with drawn_seed(*seed.tolist()):
        assert_matches_dense(make_arguments(N=2, L=L, S=S, H=2, H_kv=2, dropout_p=0.4, **PER_HEAD), keep)


def test_every_instruction_set_draws_the_same():
    arguments = make_arguments(L=17, S=300, dropout_p=0.5, scale=0.0, **PER_HEAD)
    former, patterns = LIBRARY.isa, []
    try:
        for name in LIBRARY.available_isas:
            LIBRARY.set_isa(name)
            torch.manual_seed(5)
            patterns.append(native_attention(**arguments).weights != 0)
    finally:
        LIBRARY.set_isa(former)
    assert all(torch.equal(pattern, patterns[0]) for pattern in patterns)
    assert {*patterns[0].flatten().tolist()} == {True, False}


def test_torch_manual_seed_reproduces_and_two_calls_differ(base_isa):
    arguments = make_arguments(L=17, S=30, dropout_p=0.5, need_weights=True)
    torch.manual_seed(3)
    first, second = (native_attention(**arguments).weights for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(native_attention(**arguments).weights, first)
    assert not torch.equal(first, second)


def test_no_dropout_draws_nothing(base_isa):
    state = torch.get_rng_state()
    native_attention(**make_arguments(dropout_p=0.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropping_everything_gives_zeros_and_keeps_the_log_sum_exp(base_isa):
    arguments = make_arguments(L=17, S=35, **PER_HEAD)
    dropped = native_attention(**arguments, dropout_p=1.0)
    assert not dropped.output.any()
    assert not dropped.weights.any()
    assert torch.equal(dropped.lse, native_attention(**arguments).lse)


def test_rows_whose_every_weight_is_dropped_have_finite_gradients(base_isa):
    arguments = make_arguments(L=40, S=3, dropout_p=0.9, mask_dtype=torch.float32, hidden=0.0, **PER_HEAD)
    with drawn_seed(1, 1):
        results = run_with_gradients(native_attention, arguments)
    assert bool((results["weights"] == 0).all(-1).any())
    assert all(bool(x.isfinite().all()) for x in results.values())

"""Numbers that break a careless softmax: huge, tiny, infinite and NaN scores, and rows that are hidden everywhere."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_oracle import make_arguments, run_with_gradients
from closeness import assert_close_to_oracle
from native.call_space import DTYPES
from native.dense_oracle import (
    HALF,
    assert_forward_matches_dense,
    assert_matches_dense,
    dense_attention,
    native_attention,
)

INF, NAN = float("inf"), float("nan")
PER_HEAD = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
WANTED = {"output": {}, "averaged": {"need_weights": True}, "everything": PER_HEAD}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_result = pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)


def with_scores(arguments, center):
    """The same with scores of about `center`, which differ by a few: an error of theirs is one of every weight."""
    arguments["scale"] = 1.0
    for name, first in (("query", abs(center) ** 0.5), ("key", center / abs(center) ** 0.5)):
        arguments[name] = arguments[name] / 2
        arguments[name][..., 0] = first
    return arguments


@each_dtype
@pytest.mark.parametrize("wanted", [{}, PER_HEAD], ids=["output", "everything"])
@pytest.mark.parametrize("center", [300.0, 1e4, -1e4])
@pytest.mark.parametrize("L", [1, 17])
def test_scores_that_overflow_a_naive_softmax(isa, L, center, wanted, dtype):
    arguments = with_scores(make_arguments(L=L, S=35, D=8, D_v=8, dtype=dtype, **wanted), center)
    ours = assert_matches_dense(arguments)
    assert all(bool(x.isfinite().all()) for x in ours.values())
    assert bool((ours["grad of query"] != 0).any())


@each_dtype
@pytest.mark.parametrize("L", [1, 2, 20])
@pytest.mark.parametrize("S", [64, 700])
def test_the_backward_computes_the_weights_of_the_forward(isa, L, S, dtype):
    # A score of 1e4 that is rounded otherwise than in the forward changes its weight by far more than rounding that.
    generator = torch.Generator().manual_seed(0)
    query, key = (30 * torch.randn(1, size, 1, 64, generator=generator) for size in (L, S))
    value = torch.randn(1, S, 1, 8, generator=generator).to(dtype).requires_grad_()
    output = native_attention(query=query.to(dtype), key=key.to(dtype), value=value).output
    (grad,) = torch.autograd.grad(output.sum(), value)
    rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(grad.double().sum(1), torch.full((1, 1, 8), float(L)).double(), rtol=rounding, atol=0.0)


@each_dtype
def test_scores_far_apart_leave_one_weight(isa, dtype):
    arguments = make_arguments(L=17, S=35, D=35, D_v=8, dtype=dtype, scale=1.0, **PER_HEAD)
    arguments["key"] = torch.eye(35, dtype=dtype).reshape(1, 35, 1, 35).repeat(2, 1, 2, 1)
    arguments["query"] = torch.full_like(arguments["query"], -1e4)
    choice = torch.arange(17) * 5 % 35
    arguments["query"][:, torch.arange(17), :, choice] = 1e4
    results = run_with_gradients(native_attention, arguments)
    assert torch.equal(results["weights"], torch.eye(35, dtype=dtype)[choice].expand(2, 4, 17, 35))
    assert torch.equal(results["output"], arguments["value"][:, choice].repeat_interleave(2, dim=2))
    assert all(bool(x.isfinite().all()) for x in results.values())


@each_dtype
@pytest.mark.parametrize("score", [-1e4, 1e4, -2e2])
def test_rows_of_one_huge_score_average_the_values(isa, score, dtype):
    arguments = make_arguments(L=17, S=300, D=1, D_v=8, dtype=dtype, scale=1.0, **PER_HEAD)
    arguments["query"].fill_(100.0)
    arguments["key"].fill_(score / 100.0)
    ours = assert_matches_dense(arguments)
    assert torch.equal(ours["weights"], torch.full_like(ours["weights"], 1 / 300))


@each_dtype
def test_a_maximum_that_rises_with_every_tile(isa, dtype):
    arguments = make_arguments(N=2, L=15, S=700, H=2, H_kv=2, D=1, D_v=8, dtype=dtype, scale=1.0, return_lse=True)
    arguments["query"] = (torch.rand(2, 15, 2, 1, dtype=torch.float64) + 0.5).to(dtype)
    for order in (torch.arange(700), torch.arange(700).flip(0), torch.arange(700) * 37 % 700):
        key = (order / 700.0 * 400.0 - 200.0).reshape(1, 700, 1, 1).repeat(2, 1, 2, 1)
        assert_matches_dense(arguments | {"key": key.to(dtype)})


@each_dtype
def test_subnormal_inputs(isa, dtype):
    tiny = torch.finfo(dtype).tiny
    arguments = make_arguments(L=17, S=35, D=8, D_v=8, dtype=torch.float64, need_weights=True)
    for name in ("query", "key", "value"):
        arguments[name] = (arguments[name] * tiny / 8).to(dtype)
    ours, theirs = run_with_gradients(native_attention, arguments), run_with_gradients(dense_attention, arguments)
    exact = run_with_gradients(dense_attention, arguments, torch.float64)
    unit = tiny * torch.finfo(dtype).eps
    for name in ("output", "grad of query", "grad of key"):
        error, torch_error = ((x[name].double() - exact[name]).abs().max().item() for x in (ours, theirs))
        assert error <= 2 * torch_error + 4 * 35**0.5 * unit, name
    for name in ("weights", "grad of value"):
        assert_close_to_oracle({name: ours[name]}, theirs, lambda name=name: {name: exact[name]}, terms=35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_subnormal_half_and_tiny_single_values_are_not_flushed(isa, dtype):
    value = {torch.float32: 1e-39, torch.float16: 2.0**-24}[dtype]
    arguments = make_arguments(L=17, S=35, dtype=dtype)
    arguments["value"].fill_(value)
    output = native_attention(**arguments).output
    assert (output.double() - arguments["value"][0, 0, 0, 0].double()).abs().max() <= 2.0**-24 * (dtype in HALF) + 2e-44
    assert bool((output != 0).all())


@pytest.mark.parametrize("scale", [1e-50, 1e-44, 1e-20, 1e20, 1e38], ids=str)
@each_dtype
def test_scales_beyond_the_range_of_fp32(isa, dtype, scale):
    for masks in ({"is_causal": True}, {"mask_dtype": torch.float32}):
        arguments = make_arguments(L=17, S=35, dtype=dtype, scale=scale, **masks, **PER_HEAD)
        if scale > 1:
            arguments["key"] = torch.zeros_like(arguments["key"])
        assert_forward_matches_dense(arguments)


def without_flash(function):
    """torch's formula in place of its fused kernel, which is wrong where a row has finfo.min in every place."""

    def run_it(**arguments):
        with sdpa_kernel(SDPBackend.MATH):
            return function(**arguments)

    return run_it


@each_dtype
@each_result
@pytest.mark.parametrize("where", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("mask_dtype", [torch.float32, "own"], ids=str)
def test_rows_of_which_every_key_has_the_smallest_number_added(isa, where, wanted, dtype, mask_dtype):
    mask_dtype = dtype if mask_dtype == "own" else mask_dtype
    arguments = make_arguments(L=17, S=35, D=8, D_v=8, dtype=dtype, **wanted)
    lowest = torch.finfo(mask_dtype).min
    mask = torch.zeros((17, 35) if where == "attn_mask" else (2, 35), dtype=mask_dtype)
    mask[1] = lowest
    mask[0, 5:] = lowest
    arguments[where] = mask
    through = ("output", "weights")  # -3e38 + log(35) = -3e38: torch's own lse has no right gradient there
    ours = run_with_gradients(native_attention, arguments, through=through)
    exact = run_with_gradients(dense_attention, arguments, torch.float64, through)
    theirs = run_with_gradients(without_flash(dense_attention), arguments, through=through)
    usable = {name: x if bool(x.isfinite().all()) else exact[name] for name, x in theirs.items()}
    if "lse" in usable and dtype in HALF:
        usable["lse"] = run_with_gradients(without_flash(dense_attention), arguments, torch.float32)["lse"]
    for results in (ours, exact, usable):  # -3e38 would be the measure of all the others
        if "lse" in results:
            results["lse"] = torch.where(results["lse"].abs() > 1e4, torch.zeros_like(results["lse"]), results["lse"])
    assert_close_to_oracle(ours, usable, lambda: exact, 2 * 4 * 17 * 35, dtype)


@each_dtype
def test_the_lse_of_a_row_of_smallest_numbers_has_the_gradient_of_equal_weights(isa, dtype):
    arguments = make_arguments(L=17, S=35, H_kv=4, D=8, dtype=dtype, return_lse=True, scale=1.0)
    arguments["attn_mask"] = torch.full((17, 35), torch.finfo(torch.float32).min)
    query = run_with_gradients(native_attention, arguments, through=("lse",))["grad of query"]
    arguments["attn_mask"] = torch.zeros(17, 35)
    arguments["query"] = torch.zeros_like(arguments["query"])
    assert torch.equal(query, run_with_gradients(native_attention, arguments, through=("lse",))["grad of query"])


@each_dtype
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
def test_minus_infinity_in_a_float_mask_hides_as_true_in_a_bool_mask(isa, mask_dtype, dtype):
    arguments = make_arguments(L=17, S=70, dtype=dtype, mask_dtype=torch.bool, padding_dtype=torch.bool, **PER_HEAD)
    arguments["attn_mask"][3] = True
    arguments["attn_mask"][:, 8:40] = True
    as_float = dict(arguments)
    for name in ("attn_mask", "key_padding_mask"):
        as_float[name] = torch.zeros(arguments[name].shape, dtype=mask_dtype).masked_fill(arguments[name], -INF)
    hidden = native_attention(**arguments), native_attention(**as_float)
    assert torch.equal(hidden[0].weights == 0, hidden[1].weights == 0)
    assert torch.equal(hidden[0].lse.isneginf(), hidden[1].lse.isneginf())
    assert_matches_dense(as_float)


def nan_pattern(function, arguments):
    """Where results are NaN; the log-sum-exp, which torch's module has not, where it is NaN or infinite."""
    results = function(**arguments)._asdict()
    return {name: ~x.isfinite() if name == "lse" else x.isnan() for name, x in results.items() if x is not None}


@each_dtype
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
def test_poison_gives_nan_where_torch_does_and_in_no_other_batch_element(isa, poison, name, dtype):
    arguments = make_arguments(N=3, L=17, S=40, H=2, H_kv=2, D=5, dtype=dtype, **PER_HEAD)
    clean = run_with_gradients(native_attention, arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 6, 1, 2] = poison
    found = nan_pattern(native_attention, arguments)
    for result, expected in nan_pattern(dense_attention, arguments).items():
        assert torch.equal(found[result], expected), result
    poisoned = run_with_gradients(native_attention, arguments)
    for result, expected in clean.items():
        for n in (0, 2):
            assert torch.equal(poisoned[result][n], expected[n]), result
    if name == "query":
        rows = torch.arange(17) != 6
        assert torch.equal(poisoned["output"][1, rows], clean["output"][1, rows])
        assert torch.equal(poisoned["grad of query"][1, rows], clean["grad of query"][1, rows])


@each_dtype
def test_nan_in_a_query_reaches_the_weights_of_its_row_alone(isa, dtype):
    arguments = make_arguments(N=1, L=20, S=300, H=2, dtype=dtype, need_weights=True, is_causal=True)
    clean = native_attention(**arguments).weights
    arguments["query"][0, 7, 0, 0] = NAN
    weights = native_attention(**arguments).weights
    assert bool(weights[0, 7, :8].isnan().all())
    rows = torch.arange(20) != 7
    assert torch.equal(weights[0, rows], clean[0, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_cap_is_within_few_units_in_the_last_place_of_tanh(base_isa, dtype, sign):
    """The log-sum-exp of one key is its score."""
    units = 4 if dtype == torch.float32 else 8  # the polynomial of fp64 begins 2.5 units from ln 2
    scores = torch.cat([torch.logspace(-30, 3, 2001, dtype=torch.float64), torch.linspace(0, 12, 2001)])
    scores = sign * scores.to(dtype)[:, None, None, None]
    one = torch.ones_like(scores)
    for softcap in (1.0, 30.0):
        found = native_attention(
            query=scores * softcap, key=one, value=one, softcap=softcap, scale=1.0, return_lse=True
        )
        exact = torch.tanh((scores * softcap).to(torch.float64) / softcap).flatten() * softcap
        unit = torch.finfo(dtype).eps * exact.abs()
        assert ((found.lse.flatten().double() - exact).abs() <= units * unit).all()


@pytest.mark.parametrize("shape", [(40, 2), (1, 3), (33, 700), (1, 700)], ids=str)
def test_far_keys_of_alibi_have_no_weight_and_nothing_else_is_flushed(base_isa, shape):
    """Numbers below the normal ones count in a call after one with ALiBi, which flushes them."""
    arguments = make_arguments(N=1, L=shape[0], S=shape[1], H=2, H_kv=2)
    slopes = torch.tensor([0.6, 3.0])
    far = native_attention(**arguments, alibi_slopes=slopes, need_weights=True, average_attn_weights=False).weights
    assert ((far == 0) | (far >= torch.finfo(torch.float32).tiny)).all()
    assert (torch.full((64,), 1e-39) * 1.0 == 1e-39).all()
    tiny = torch.full((1, 1, 1, 1), 1e-39)
    assert native_attention(torch.ones_like(tiny), torch.ones_like(tiny), tiny).output.item() == tiny.item()

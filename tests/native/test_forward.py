"""The forward kernels of every instruction set against the fp64 oracle, over the whole space of calls."""

import pytest
import torch
from hypothesis import given, settings

import fused_mha
from attention_oracle import make_arguments, naive_attention, run_with_gradients
from closeness import assert_close_to_oracle
from fused_mha.testing.tolerances import tolerance
from native.call_space import DTYPES, LAYOUTS, MASK_SHAPES, calls, lay_out
from native.dense_oracle import (
    assert_forward_matches_dense,
    assert_matches_dense,
    dense_attention,
    drawn_seed,
    native_attention,
)
from native.philox import drawn_probability

from search import examples

EVERYTHING = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
HEAD_SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 80, 96, 112, 127, 128, 129, 160, 256, 511, 512]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@settings(max_examples=examples(150))
@given(call=calls(dropout=(0.0, 0.0, 0.1, 0.5)))
def test_any_call_matches_the_oracle(base_isa, call):
    with drawn_seed(*call.seed):
        assert_forward_matches_dense(call.arguments, call.keep())


@settings(max_examples=examples(40))
@given(call=calls(dtypes=(torch.bfloat16,), dropout=(0.0, 0.0, 0.1, 0.5)))
def test_any_call_in_bfloat16_matches_the_oracle(bf16_isa, call):
    with drawn_seed(*call.seed):
        assert_forward_matches_dense(call.arguments, call.keep())


@settings(max_examples=examples(40))
@given(call=calls(dtypes=(torch.float64,), dropout=(0.0, 0.3)))
def test_the_oracle_itself_is_the_naive_loop(call):
    arguments = {**call.arguments, "dropout_p": drawn_probability(call.arguments["dropout_p"])}
    if arguments["query"].shape[0] * arguments["query"].shape[1] * arguments["query"].shape[2] > 60:
        arguments = {**arguments, "query": arguments["query"][:, :5]}
        for name in ("attn_mask",):
            if name in arguments:
                rows = arguments[name].shape[-2]
                arguments[name] = arguments[name][..., : min(rows, arguments["query"].shape[1]), :]
    keep = call.keep()
    keep = None if keep is None else keep[:, :, : arguments["query"].shape[1]]
    dense, naive = (
        run_with_gradients(lambda f=f, **a: f(keep, **a), arguments, torch.float64)
        for f in (dense_attention, naive_attention)
    )
    assert_close_to_oracle(dense, naive, lambda: naive, 10_000)


@each_dtype
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_head_sizes(isa, D, dtype):
    assert_forward_matches_dense(make_arguments(N=1, L=5, S=37, H=2, H_kv=1, D=D, D_v=D, dtype=dtype, is_causal=True))


@each_dtype
@pytest.mark.parametrize(("D", "D_v"), [(1, 512), (512, 1), (64, 33), (33, 64), (16, 100), (127, 8)])
def test_value_size_differs_from_key_size(isa, D, D_v, dtype):
    assert_forward_matches_dense(make_arguments(N=2, L=15, S=40, H=4, H_kv=2, D=D, D_v=D_v, dtype=dtype, **EVERYTHING))


@each_dtype
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1), (7, 1)], ids=str)
def test_grouped_heads(isa, heads, dtype):
    H, H_kv = heads
    assert_forward_matches_dense(
        make_arguments(L=17, S=33, H=H, H_kv=H_kv, D=16, D_v=16, dtype=dtype, mask_dtype=torch.bool)
    )


@pytest.mark.parametrize("L", [1, 13, 14, 15, 90])
@pytest.mark.parametrize("S", [1, 31, 256, 257, 600])
def test_lengths_around_the_tiles(base_isa, L, S):
    masks = {"mask_dtype": torch.bool, "mask_shape": "LS", "padding_dtype": torch.bool, "hidden": 0.4}
    for wanted in ({}, {"need_weights": True, "return_lse": True}, EVERYTHING):
        assert_forward_matches_dense(make_arguments(N=1, L=L, S=S, H=2, D=8, D_v=8, **wanted))
        assert_forward_matches_dense(make_arguments(N=1, L=L, S=S, H=2, D=8, D_v=8, **masks, **wanted))


@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}], ids=["output", "weights"])
@pytest.mark.parametrize("positive", [False, True], ids=["", "positive values"])
def test_sums_over_many_keys_are_as_accurate_as_torchs(base_isa, positive, wanted):
    arguments = make_arguments(N=1, L=8, S=8192, H=1, H_kv=1, D=32, D_v=32, **wanted)
    if positive:  # then every partial sum is far larger than its next term
        arguments["value"] = arguments["value"].abs()
    assert_forward_matches_dense(arguments)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_shape", MASK_SHAPES)
def test_masks_of_every_broadcast_shape(base_isa, mask_shape, mask_dtype):
    masks = {"mask_shape": mask_shape, "mask_dtype": mask_dtype, "hidden": 0.5}
    for padding_dtype in (None, torch.bool, torch.float16):
        assert_forward_matches_dense(make_arguments(L=16, S=35, padding_dtype=padding_dtype, **masks, **EVERYTHING))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("L", "S"), [(70, 70), (20, 90), (90, 20), (33, 300)])
def test_causality_and_windows(base_isa, L, S, is_causal, alignment):
    for window in (None, (0, 0), (3, None), (None, 2), (20, 40), (None, None)):
        band = {"is_causal": is_causal, "causal_alignment": alignment, "window": window}
        virtual = {"bias_kv": True, "add_zero_attn": True}
        assert_forward_matches_dense(make_arguments(N=1, L=L, S=S, D=8, D_v=8, **band))
        assert_forward_matches_dense(make_arguments(N=1, L=L, S=S, D=8, D_v=8, **virtual, **band, **EVERYTHING))


@pytest.mark.parametrize("window", [(2**40, 2**40), (0, 2**62), (2**62, 0), (2**63 - 1, 2**63 - 1)], ids=str)
def test_a_window_wider_than_every_key_limits_nothing(base_isa, window):
    arguments = make_arguments(L=5, S=40)
    left, right = (None if side > 40 else side for side in window)
    wide = native_attention(**arguments, window=window).output
    assert torch.equal(wide, native_attention(**arguments, window=(left, right)).output)


@pytest.mark.parametrize("empty", [{"N": 0}, {"L": 0}, {"S": 0}, {"N": 0, "L": 0, "S": 0}, {"D_v": 0}], ids=str)
@pytest.mark.parametrize("virtual", [{}, {"bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_empty_sizes(base_isa, empty, virtual):
    for masks in ({}, {"mask_dtype": torch.bool, "padding_dtype": torch.float32}):
        for average in (True, False):
            wanted = EVERYTHING | {"average_attn_weights": average}
            assert_matches_dense(make_arguments(**empty, **virtual, **masks, **wanted))


@each_dtype
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "key_padding_mask", "bias_k", "bias_v"])
def test_any_memory_layout_gives_the_same_bits(isa, name, dtype):
    masks = {"mask_dtype": dtype, "mask_shape": "NHLS", "padding_dtype": dtype, "bias_kv": True}
    arguments = make_arguments(L=5, S=35, D=17, D_v=9, dtype=dtype, **masks, **EVERYTHING)
    for layout in LAYOUTS:
        laid_out = lay_out(arguments[name], layout)
        expected = native_attention(**arguments | {name: laid_out.clone(memory_format=torch.contiguous_format)})
        for result, same in zip(native_attention(**arguments | {name: laid_out}), expected, strict=True):
            assert torch.equal(result, same), layout


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "key_padding_mask"])
def test_a_lazily_negated_view_is_read_negated(base_isa, name):
    masks = {"mask_dtype": torch.float32, "mask_shape": "NHLS", "padding_dtype": torch.float32, "hidden": 0.0}
    arguments = make_arguments(L=5, S=6, D=1, D_v=1, **masks)
    negated = torch.complex(torch.zeros_like(arguments[name]), -arguments[name]).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, arguments[name])
    expected = native_attention(**arguments).output
    assert torch.equal(native_attention(**arguments | {name: negated}).output, expected)


@each_dtype
def test_lse_is_the_natural_logarithm_of_the_sum(isa, dtype):
    arguments = make_arguments(N=1, L=3, S=50, H=2, dtype=dtype, scale=0.0, return_lse=True)
    lse = native_attention(**arguments).lse
    expected = torch.full_like(lse, 50.0).log()
    assert (lse - expected).abs().max().item() <= tolerance(lse.dtype, 0.0, expected.abs().max().item())


@each_dtype
@pytest.mark.parametrize("S", [5, 260])
def test_averaged_weights_are_the_mean_of_those_per_head(isa, dtype, S):
    arguments = make_arguments(L=16, S=S, H=6, dtype=dtype, mask_dtype=torch.bool, mask_shape="HLS", hidden=0.5)
    per_head = native_attention(**arguments, need_weights=True, average_attn_weights=False).weights
    averaged = native_attention(**arguments, need_weights=True).weights
    exact = dense_attention(
        **arguments | {name: arguments[name].double() for name in ("query", "key", "value")}, need_weights=True
    ).weights
    torch_error = (per_head.mean(1).double() - exact).abs().max().item()
    assert (averaged.double() - exact).abs().max().item() <= tolerance(dtype, torch_error, exact.max().item())


def test_results_are_contiguous_and_arguments_stay_as_they_were(base_isa):
    masks = {"mask_dtype": torch.float32, "padding_dtype": torch.bool, "bias_kv": True}
    arguments = make_arguments(L=16, S=35, **masks, **EVERYTHING)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    results = native_attention(**arguments)
    assert all(x.is_contiguous() for x in results)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_no_weights_no_query_heads(base_isa):
    query, keys = torch.zeros(2, 3, 0, 4), torch.zeros(2, 5, 1, 4)
    with fused_mha.backend("cpu"):
        result = fused_mha.attention(query, keys, keys, need_weights=True, average_attn_weights=False, return_lse=True)
    assert [tuple(x.shape) for x in result] == [(2, 3, 0, 4), (2, 0, 3, 5), (2, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_over_no_heads_is_zero(isa, dtype):
    query, keys = torch.zeros(2, 300, 0, 4, dtype=dtype), torch.zeros(2, 500, 1, 4, dtype=dtype)
    for garbage in (float("nan"), 3e38):
        trash = [torch.full((size,), garbage) for size in (50_000, 100_000, 300_000)]
        del trash
        assert not native_attention(query=query, key=keys, value=keys, need_weights=True).weights.any()

"""The backward kernels of every instruction set against the fp64 oracle: every gradient, through every result."""

import pytest
import torch
from hypothesis import given, settings

from attention_oracle import make_arguments, run_with_gradients
from fused_mha.testing.tolerances import tolerance
from native.call_space import DTYPES, LAYOUTS, MASK_SHAPES, calls, lay_out
from native.dense_oracle import assert_matches_dense, drawn_seed, native_attention

from search import examples

PER_HEAD = {"need_weights": True, "average_attn_weights": False}
THROUGH = {
    "output": ({}, ("output",)),
    "averaged weights": ({"need_weights": True}, ("weights",)),
    "weights per head": (PER_HEAD, ("weights",)),
    "lse": ({"return_lse": True}, ("lse",)),
    "output and averaged weights": ({"need_weights": True, "return_lse": True}, ("output", "weights")),
    "everything": (PER_HEAD | {"return_lse": True}, ("output", "weights", "lse")),
}
MASKS = {
    "no mask": {},
    "bool mask and padding": {"mask_dtype": torch.bool, "mask_shape": "NHLS", "padding_dtype": torch.bool},
    "dropout": {"dropout_p": 0.3, "mask_dtype": torch.bool, "mask_shape": "HLS"},
    "float mask and padding": {"mask_dtype": torch.float32, "padding_dtype": torch.float32},
    "float mask per head": {"mask_dtype": torch.float32, "mask_shape": "HLS", "bias_kv": True, "add_zero_attn": True},
    "causal and dropout": {"is_causal": True, "bias_kv": True, "dropout_p": 0.3},
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@settings(max_examples=examples(120))
@given(call=calls(dropout=(0.0, 0.0, 0.1, 0.5)))
def test_any_call_matches_the_oracle(base_isa, call):
    with drawn_seed(*call.seed):
        assert_matches_dense(call.arguments, call.keep())


@settings(max_examples=examples(40))
@given(call=calls(dtypes=(torch.bfloat16,), dropout=(0.0, 0.0, 0.1, 0.5)))
def test_any_call_in_bfloat16_matches_the_oracle(bf16_isa, call):
    with drawn_seed(*call.seed):
        assert_matches_dense(call.arguments, call.keep())


@each_dtype
@pytest.mark.parametrize("D", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 127, 128, 129, 256, 511, 512])
def test_head_sizes(isa, D, dtype):
    assert_matches_dense(make_arguments(N=1, L=5, S=37, H=2, H_kv=1, D=D, D_v=D, dtype=dtype, is_causal=True))


@each_dtype
@pytest.mark.parametrize(("D", "D_v"), [(1, 512), (512, 1), (64, 33), (33, 64), (127, 8)])
def test_value_size_differs_from_key_size(isa, D, D_v, dtype):
    assert_matches_dense(make_arguments(N=2, L=15, S=40, H=4, H_kv=2, D=D, D_v=D_v, dtype=dtype, need_weights=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_gradients_through_each_result(isa, through, masks, dtype):
    wanted, names = through
    arguments = make_arguments(L=17, S=35, D=9, D_v=6, dtype=dtype, hidden=0.3, **masks, **wanted)
    keep, dropout_p = None, masks.get("dropout_p")
    if dropout_p:
        width = 35 + ("bias_k" in arguments) + bool(arguments.get("add_zero_attn"))
        keep = torch.ops.fused_mha.dropout_mask(torch.tensor([5, 6]), (2, 4, 17, width), dropout_p)
    with drawn_seed(5, 6):
        ours = assert_matches_dense(arguments, keep, through=names)
    assert bool((ours["grad of query"] != 0).any())


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_shape", MASK_SHAPES)
def test_gradient_of_a_float_mask_sums_over_what_it_broadcasts(base_isa, mask_shape, mask_dtype):
    arguments = make_arguments(N=3, L=16, S=35, mask_shape=mask_shape, mask_dtype=mask_dtype, padding_dtype=mask_dtype)
    ours = assert_matches_dense(arguments)
    assert bool((ours["grad of attn_mask"] != 0).any())


@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}], ids=["output", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("L", [1, 57, 130])
def test_long_sequences_of_several_chunks(isa, L, dtype, wanted):
    masks = {"mask_dtype": torch.float32, "mask_shape": "LS", "padding_dtype": torch.bool, "bias_kv": True}
    assert_matches_dense(make_arguments(N=1, L=L, S=1150, H=2, H_kv=1, D=20, D_v=12, dtype=dtype, **masks, **wanted))


def test_sums_over_many_queries_are_as_accurate_as_torchs(base_isa):
    assert_matches_dense(make_arguments(N=1, L=8192, S=8, H=1, H_kv=1, D=32, D_v=32))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("L", "S"), [(70, 70), (20, 90), (90, 20)])
def test_causality_and_windows(base_isa, L, S, is_causal, alignment):
    for window in ((0, 0), (3, None), (None, 2), (20, 40)):
        band = {"is_causal": is_causal, "causal_alignment": alignment, "window": window}
        assert_matches_dense(make_arguments(N=1, L=L, S=S, D=8, D_v=8, **band))
        assert_matches_dense(make_arguments(N=1, L=L, S=S, D=8, D_v=8, bias_kv=True, add_zero_attn=True, **band))


@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (6, 1), (7, 1)], ids=str)
@pytest.mark.parametrize("mask_shape", ["LS", "HLS", "NLS"])
def test_grouped_heads_add_to_the_gradients_of_their_key_head(base_isa, heads, mask_shape):
    H, H_kv = heads
    masks = {"mask_dtype": torch.float32, "mask_shape": mask_shape, "bias_kv": True}
    assert_matches_dense(make_arguments(L=17, S=33, H=H, H_kv=H_kv, D=16, D_v=16, **masks))


@each_dtype
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(isa, p, dtype):
    arguments = make_arguments(
        L=17, S=35, dtype=dtype, mask_dtype=dtype, bias_kv=True, dropout_p=p, return_lse=True, **PER_HEAD
    )
    keep = torch.full((2, 4, 17, 36), p == 0.0)
    ours = assert_matches_dense(arguments, keep)
    assert bool((ours["output"] == 0).all()) == (p == 1.0)
    assert bool((ours["grad of value"] == 0).all()) == (p == 1.0)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "key_padding_mask", "bias_k", "bias_v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout_gives_the_same_bits(isa, name, dtype):
    masks = {"mask_dtype": dtype, "mask_shape": "NHLS", "padding_dtype": dtype, "bias_kv": True}
    arguments = make_arguments(L=5, S=35, D=17, D_v=9, dtype=dtype, need_weights=True, **masks)
    for layout in LAYOUTS:
        laid_out = lay_out(arguments[name], layout)
        copied = laid_out.clone(memory_format=torch.contiguous_format)
        results, expected = (run_with_gradients(native_attention, arguments | {name: x}) for x in (laid_out, copied))
        assert set(results) == set(expected)
        for key, result in results.items():
            assert torch.equal(result, expected[key]), (layout, key)


@pytest.mark.parametrize("layout", [*LAYOUTS, "sum"])
def test_any_memory_layout_of_the_incoming_gradients_gives_the_same_bits(base_isa, layout):
    arguments = make_arguments(L=5, S=35, D=17, D_v=9, return_lse=True, **PER_HEAD)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    results = native_attention(**arguments)
    cotangents = [torch.randn(x.shape) for x in results]
    if layout == "sum":
        cotangents = [torch.ones(()).expand(x.shape) for x in results]
    laid_out = [x if layout == "sum" else lay_out(x, layout) for x in cotangents]
    grads = torch.autograd.grad(results, leaves, laid_out, retain_graph=True)
    expected = torch.autograd.grad(results, leaves, [x.contiguous() for x in laid_out])
    assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))


def test_gradients_of_what_is_not_asked_for_are_none_and_change_no_other(base_isa):
    masks = {"mask_dtype": torch.float32, "padding_dtype": torch.float32, "bias_kv": True}
    arguments = make_arguments(L=17, S=35, **masks)
    everything = run_with_gradients(native_attention, arguments)
    cotangent = torch.randn(2, 17, 4, 5, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).float()
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            leaf = x.clone().requires_grad_()
            native_attention(**arguments | {name: leaf}).output.backward(cotangent)
            assert torch.equal(leaf.grad, everything[f"grad of {name}"]), name


def test_self_attention_adds_the_gradients_of_query_key_and_value(base_isa):
    x = torch.randn(2, 33, 4, 16, requires_grad=True)
    native_attention(query=x, key=x, value=x, is_causal=True).output.square().sum().backward()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    native_attention(query=parts[0], key=parts[1], value=parts[2], is_causal=True).output.square().sum().backward()
    expected = sum(part.grad for part in parts)  # in one of the orders in which autograd may add them
    assert (x.grad - expected).abs().max().item() <= tolerance(torch.float32, 0.0, expected.abs().max().item())


def test_backward_twice_through_one_graph_gives_the_same_bits(base_isa):
    arguments = make_arguments(L=17, S=35, dropout_p=0.4)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    output = native_attention(**arguments).output
    cotangent = torch.randn_like(output)
    first, second = (torch.autograd.grad(output, leaves, cotangent, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("empty", [{"N": 0}, {"L": 0}, {"S": 0}], ids=str)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_gradients_of_empty_calls_are_zeros_of_the_right_shape(base_isa, empty, masks):
    arguments = make_arguments(**{"L": 5, "S": 6} | masks | empty | {"dropout_p": 0.0}, return_lse=True, **PER_HEAD)
    ours = assert_matches_dense(arguments)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert ours[f"grad of {name}"].shape == x.shape


def test_gradients_of_two_masks_of_keys_are_two_tensors():
    query, key, value = (torch.randn(2, length, 1, 16) for length in (3, 7, 7))
    mask, padding = torch.zeros(2, 1, 1, 7, requires_grad=True), torch.zeros(2, 7, requires_grad=True)
    for _ in range(2):  # a second gradient is added to the first in place
        results = native_attention(query=query, key=key, value=value, attn_mask=mask, key_padding_mask=padding)
        results.output.square().sum().backward()
    output = native_attention(query=query, key=key, value=value, key_padding_mask=padding).output
    (single,) = torch.autograd.grad(output.square().sum(), padding)
    torch.testing.assert_close(padding.grad, 2 * single)
    torch.testing.assert_close(mask.grad, 2 * single[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("padding", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("L", "S"), [(20, 4), (1, 4), (20, 40), (1, 40)])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 0.9}, {"alibi_slopes": torch.tensor([0.3, 0.1, 0.7])}], ids=["", "softcap", "ALiBi"]
)
def test_a_query_that_sees_one_key_has_no_gradient(base_isa, L, S, padding, mask, dtype, options):
    # Its weight is 1 in the backward too, as both compute the same bits of a score.
    given = make_arguments(N=2, L=L, S=S, H=3, H_kv=3, D=7, D_v=5, dtype=dtype, scale=0.3, padding_dtype=padding)
    seen = torch.arange(S) == S - 1
    hidden = ~seen.expand(L, S)
    given["attn_mask"] = hidden if mask == torch.bool else torch.where(hidden, -torch.inf, 0.39).to(mask)
    if padding is not None:
        given["key_padding_mask"] = torch.full((2, S), 0.17, dtype=padding)
    given |= options
    query = given["query"].requires_grad_()
    output = native_attention(**given).output
    (grad,) = torch.autograd.grad(output, query, torch.randn_like(output))
    assert torch.equal(grad, torch.zeros_like(grad))

"""`varlen_attention`: packed sequences, each as if it were alone, on every back end and inside torch."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fused_mha
from attention_oracle import SERVE_EVERYTHING
from closeness import assert_close_to_oracle, in_fp64
from packed_calls import LENGTHS, OPTIONS, cu_seqlens, one_by_one, packed_call, random_calls, varlen, with_gradients

serving = pytest.mark.parametrize("back_end", SERVE_EVERYTHING)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def reference(**arguments):
    with fused_mha.backend("reference"):
        return one_by_one(**arguments)


def assert_is_attention_of_each(arguments, back_end, dtype):
    with fused_mha.backend(back_end):
        ours = with_gradients(varlen, arguments)

    def oracle():
        return with_gradients(reference, in_fp64(arguments))

    longest = max(arguments["query"].shape[0], arguments["key"].shape[0], 1)
    assert_close_to_oracle(ours, with_gradients(reference, arguments), oracle, longest, dtype)


@serving
@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_each_sequence_is_attended_to_as_if_it_were_alone(back_end, options, dtype):
    assert_is_attention_of_each(packed_call(dtype=dtype, **options), back_end, dtype)


@settings(max_examples=60, deadline=None)
@given(arguments=random_calls())
def test_any_call_is_that_of_each_sequence(arguments):
    for back_end in SERVE_EVERYTHING:
        assert_is_attention_of_each(arguments, back_end, torch.float32)


@serving
def test_rows_behind_the_last_sequence_give_zeros_and_get_no_gradient(back_end):
    arguments = packed_call(rest=4, is_causal=True)
    with fused_mha.backend(back_end):
        results = with_gradients(varlen, arguments)
    for name in ("output", "gradient of query", "gradient of key", "gradient of value"):
        assert not results[name][-4:].any(), name
    assert torch.equal(results["lse"][:, -4:], torch.full((4, 4), float("-inf")))


@serving
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_sequence_drops_what_its_element_of_a_padded_batch_drops(back_end, is_causal):
    lengths = (5, 12, 1, 9)
    rows = [torch.randn(sum(lengths), 3, 8) for _ in range(3)]
    padding = torch.arange(12) >= torch.tensor(lengths)[:, None]
    padded = [fused_mha.unpack(x, padding) for x in rows]
    settings = {"is_causal": is_causal, "dropout_p": 0.4, "return_lse": True}
    offsets = cu_seqlens(lengths)

    def draws(*_, **__):
        return torch.tensor([5, 6])

    if back_end == "reference":  # of the operator, in whose place it replays what a kernel has drawn
        arguments = _operator_arguments(rows, offsets, is_causal)
        output, _, lse, _ = torch.ops.fused_mha.attention.default.redispatch(_COMPOSITE, *arguments)
        packed = fused_mha.AttentionResult(output[0], None, lse[0])
    else:
        with mock.patch.object(torch, "randint", draws):
            packed = fused_mha.varlen_attention(*rows, offsets, offsets, **settings)
    with mock.patch.object(torch, "randint", draws), fused_mha.backend("cpu"):
        expected = fused_mha.attention(*padded, key_padding_mask=padding, **settings)
    torch.testing.assert_close(packed.output, fused_mha.pack(expected.output, padding)[0])
    torch.testing.assert_close(packed.lse, fused_mha.pack(expected.lse.transpose(1, 2), padding)[0].T)


_COMPOSITE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def _operator_arguments(rows, offsets, is_causal):
    tensors = (*(x[None] for x in rows), None, None, None, None, torch.tensor([5, 6]), None, None, offsets, offsets)
    return *tensors, None, 0 if is_causal else None, False, False, 0.4, 8**-0.5, None, False, True, None


@pytest.mark.parametrize("name", ["int32", "int64"])
def test_offsets_may_be_of_either_integer_type(name):
    arguments = packed_call()
    dtype = getattr(torch, name)
    changed = {k: x.to(dtype) if k.startswith("cu_") else x for k, x in arguments.items()}
    assert torch.equal(varlen(**changed)[0], varlen(**arguments)[0])


@serving
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cu_seqlens_q": [0, 3]}, TypeError, "cu_seqlens_q must be a Tensor, not list"),
        ({"cu_seqlens_q": torch.tensor([0.0, 3.0])}, RuntimeError, "cu_seqlens_q must be 1-D, of dtype int32 or int64"),
        ({"cu_seqlens_k": torch.tensor([[0, 3]])}, RuntimeError, "cu_seqlens_k must be 1-D, of dtype int32 or int64"),
        ({"cu_seqlens_q": torch.tensor([0, 3], device="meta")}, RuntimeError, "cu_seqlens_q must be on query's device"),
        (
            {"cu_seqlens_q": torch.tensor([0, 3])},
            RuntimeError,
            "one element more than there are sequences; got 2 and 3",
        ),
        ({"cu_seqlens_q": torch.tensor([1, 3, 5])}, RuntimeError, "cu_seqlens_q must begin with 0; got 1"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 3])}, RuntimeError, "cu_seqlens_k must not descend; got 3 behind 5 at 2"),
        (
            {"cu_seqlens_q": torch.tensor([0, 3, 9])},
            RuntimeError,
            "not reach beyond the 5 tokens there are; got 9 at 2",
        ),
        ({"query": torch.randn(2, 5, 4, 16)}, RuntimeError, "query must be 3-D"),
        (
            {"key": torch.randn(6, 2, 12)},
            RuntimeError,
            r"key must have shape \(T_k, H_kv, D\) with query's D = 16; got \(6, 2, 12\), query is \(5, 4, 16\)",
        ),
        (
            {"value": torch.randn(5, 2, 24)},
            RuntimeError,
            r"value must have shape \(T_k, H_kv, D_v\) with key's \(T_k, H_kv\) = \(6, 2\); got \(5, 2, 24\)",
        ),
        (
            {"key_padding_mask": torch.zeros(5)},
            RuntimeError,
            r"key_padding_mask must have shape \(T_k,\) = \(6,\); got \(5,\)",
        ),
        (
            {"query": torch.randn(5, 4, 0), "key": torch.randn(6, 2, 0)},
            RuntimeError,
            r"query must have a head size of at least 1; got shape \(5, 4, 0\)",
        ),
        ({"query": None}, TypeError, "query must be a Tensor, not NoneType"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a Tensor, not list"),
        ({"key_padding_mask": torch.zeros(2, 6)}, RuntimeError, "key_padding_mask must be 1-D"),
        ({"softcap": -1.0}, ValueError, "softcap"),
    ],
)
def test_bad_input_is_refused_by_name(back_end, change, error, text):
    arguments = packed_call(((2, 3), (4, 2))) | change
    with fused_mha.backend(back_end), pytest.raises(error, match=text):
        varlen(**arguments)


def test_no_sequence_at_all_is_served():
    arguments = packed_call(((), ()), rest=3)
    assert not varlen(**arguments)[0].any()
    assert varlen(**packed_call(((), ())))[0].shape == (0, 4, 24)


@serving
def test_no_head_at_all_is_served(back_end):
    query, key, offsets = torch.randn(9, 0, 8, requires_grad=True), torch.randn(9, 1, 8), torch.tensor([0, 4, 9])
    with fused_mha.backend(back_end):
        output = fused_mha.varlen_attention(query, key, key, offsets, offsets).output
        output.sum().backward()
    assert output.shape == (9, 0, 8)


def test_offsets_of_inference_mode_are_recorded():
    with torch.inference_mode():
        offsets = torch.tensor([0, 4, 9])
    query = torch.randn(9, 1, 8, requires_grad=True)
    fused_mha.varlen_attention(query, query, query, offsets, offsets).output.sum().backward()
    assert query.grad is not None


def test_flops_are_counted_for_each_sequence():
    arguments = packed_call(D=8, D_v=12)
    scores = 4 * sum(q * k for q, k in zip(*LENGTHS, strict=True))
    arguments["query"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        output, _ = varlen(**arguments)
    assert counter.get_total_flops() == 2 * scores * (8 + 12)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * scores * (3 * 8 + 2 * 12)


def test_flops_of_offsets_without_values_are_those_of_one_sequence():
    with FakeTensorMode():
        arguments = packed_call(D=8, D_v=12)
        arguments["query"].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            varlen(**arguments)[0].sum().backward()
    scores = 4 * sum(LENGTHS[0]) * sum(LENGTHS[1])
    assert counter.get_total_flops() == 2 * scores * (8 + 12 + 3 * 8 + 2 * 12)


@pytest.mark.parametrize(
    "options", [{}, {"padding_dtype": torch.bool, "dropout_p": 0.5, "of_heads": ("sinks",)}], ids=str
)
def test_on_meta_there_are_shapes(options):
    arguments = packed_call(rest=2, **options)
    expected = varlen(**arguments)
    of_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    of_meta["key"].requires_grad_()
    for x, y in zip(varlen(**of_meta), expected, strict=True):
        assert (x.device.type, x.shape, x.dtype) == ("meta", y.shape, y.dtype)
    varlen(**of_meta)[0].sum().backward()
    assert of_meta["key"].grad.shape == arguments["key"].shape


def test_compiles_and_exports_without_a_break():
    arguments = packed_call(is_causal=True)
    tensors = [arguments[name] for name in ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")]

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return fused_mha.varlen_attention(*tensors, is_causal=True).output

    expected = Model()(*tensors)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Model(), fullgraph=True, backend="aot_eager")(*tensors), expected)
    assert torch.equal(torch.export.export(Model(), tuple(tensors)).module()(*tensors), expected)


def test_second_derivatives():
    arguments = packed_call(((2, 3), (4, 2)), H=2, H_kv=1, D=3, D_v=2, dtype=torch.float64, softcap=2.0)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]

    def function(query, key, value):
        return varlen(**{**arguments, "query": query, "key": key, "value": value})

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_autocast_casts_as_attention_does():
    arguments = packed_call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert varlen(**arguments)[0].dtype == torch.bfloat16


def test_a_back_end_without_packed_sequences_says_so():
    with fused_mha.backend("sdpa"), pytest.raises(RuntimeError, match=r"it knows no packed sequences \(cu_seqlens_q\)"):
        fused_mha.varlen_attention(*(torch.randn(3, 2, 8) for _ in range(3)), *(torch.tensor([0, 3]),) * 2)

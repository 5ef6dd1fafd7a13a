"""`torch.onnx.export(dynamo=False)`: every mask, and no size of the example in the graph.

torch's exporter needs the package onnx in its last step alone, for functions that our graphs have none of; the results
are compared where onnxruntime is installed (``pip install ".[onnx]"``).
"""

import io

import pytest
import torch
from torch import nn

from calls import Function
from fused_mha import KeyValueCache, MultiHeadAttention, RotaryEmbedding, scaled_dot_product_attention, varlen_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # the checks of a call read its sizes
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the exporter itself
]

E, H = 8, 2


def future(N, L):
    return torch.ones(L, L, dtype=torch.bool).triu(1)


def future_of_heads(N, L):
    return future(N, L).expand(N * H, L, L).clone()


def additive(N, L):
    return torch.rand(L, L).masked_fill(future(N, L), float("-inf"))


def everything(N, L):
    return torch.ones(L, L, dtype=torch.bool)


def last_key(N, L):
    return (torch.arange(L) == L - 1).expand(N, L).clone()


PADDED = {"attn_mask": future, "key_padding_mask": last_key}
CASES = [
    ({}, {}),
    ({"attn_mask": future}, {}),
    ({"attn_mask": additive}, {}),
    ({"attn_mask": future_of_heads}, {}),
    ({"attn_mask": everything}, {}),
    ({"key_padding_mask": last_key}, {}),
    (PADDED, {}),
    (PADDED, {"add_bias_kv": True}),
    (PADDED, {"add_zero_attn": True}),
    ({}, {"add_bias_kv": True, "add_zero_attn": True}),
]
OPTIONS = [
    ({}, {"num_kv_heads": 1, "head_dim": 6, "value_head_dim": 3}),
    ({"key_padding_mask": last_key}, {"window": (2, 1), "softcap": 2.0, "sinks": True, "alibi": True}),
    ({"attn_mask": future}, {"rope": RotaryEmbedding(4), "qk_norm": "rms", "gate": True}),
    ({}, {"rope": RotaryEmbedding(2, layout="interleaved"), "qk_norm": "layer"}),
    ({}, {"qk_norm": "l2"}),
]


class SelfAttention(nn.Module):
    def __init__(self, need_weights, batch_first, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.attention = MultiHeadAttention(E, H, batch_first=batch_first, **arguments).eval()
        self.need_weights = need_weights

    def forward(self, x, attn_mask=None, key_padding_mask=None):
        return self.attention(
            x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=self.need_weights
        )


def inputs(model, masks, N, L):
    x = torch.randn((N, L, E) if model.attention.batch_first else (L, N, E))
    return {"x": x} | {name: mask(N, L) for name, mask in masks.items()}


def export(model, masks, N, L, opset=None):
    given = inputs(model, masks, N, L)
    batch, length = (0, 1) if model.attention.batch_first else (1, 0)
    dynamic = {"x": {batch: "N", length: "L"}, "attn_mask": {0: "A", 1: "L"}, "key_padding_mask": {0: "N", 1: "L"}}
    if "attn_mask" in given and given["attn_mask"].dim() == 3:
        dynamic["attn_mask"] = {0: "NH", 1: "L", 2: "L"}
    file = io.BytesIO()
    torch.onnx.export(
        model,
        (given["x"], given.get("attn_mask"), given.get("key_padding_mask")),
        file,
        dynamo=False,
        opset_version=opset,
        input_names=list(given),
        dynamic_axes={name: dynamic[name] for name in given},
    )
    return file.getvalue()


def case_name(case):
    masks, virtual = case
    return ", ".join([*(mask.__name__ for mask in masks.values()), *virtual]) or "no mask"


each_case = pytest.mark.parametrize("case", CASES, ids=case_name)


@pytest.mark.parametrize("case", CASES + OPTIONS, ids=case_name)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", ""])
def test_examples_of_two_sizes_give_one_graph(monkeypatch, case, need_weights):
    exporter = "torch.onnx._internal.torchscript_exporter.onnx_proto_utils"
    monkeypatch.setattr(f"{exporter}._add_onnxscript_fn", lambda model, _: model)
    masks, virtual = case
    model = SelfAttention(need_weights, batch_first=True, **virtual)
    assert export(model, masks, 2, 5) == export(model, masks, 3, 7)


def assert_runs_as(model, exported, masks):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(exported)
    for N, L in ((2, 5), (3, 7), (1, 1)):
        given = inputs(model, masks, N, L)
        results = session.run(None, {name: x.numpy() for name, x in given.items()})
        for result, expected in zip(results, model(**given), strict=False):
            torch.testing.assert_close(torch.from_numpy(result), expected)


@each_case
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize(("need_weights", "opset"), [(True, None), (True, 12), (False, None)], ids=str)
def test_results_are_the_modules(case, batch_first, need_weights, opset):
    pytest.importorskip("onnx")
    masks, virtual = case
    model = SelfAttention(need_weights, batch_first, **virtual)
    assert_runs_as(model, export(model, masks, 2, 5, opset), masks)


@pytest.mark.parametrize("case", OPTIONS, ids=case_name)
@pytest.mark.parametrize(("need_weights", "opset"), [(True, None), (False, 14)], ids=str)
def test_results_with_options_are_the_modules(case, need_weights, opset):
    pytest.importorskip("onnx")
    masks, options = case
    model = SelfAttention(need_weights, batch_first=True, **options)
    assert_runs_as(model, export(model, masks, 2, 5, opset), masks)


def test_sdpa_gives_zeros_to_a_query_that_sees_no_key():
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    query, mask, file = torch.randn(2, H, 5, 4), ~everything(2, 5).triu(1), io.BytesIO()
    mask[3] = False
    model = Function(lambda query, mask: scaled_dot_product_attention(query, query, query, mask))
    torch.onnx.export(model, (query, mask), file, dynamo=False, input_names=["query", "mask"])
    (output,) = runtime.InferenceSession(file.getvalue()).run(None, {"query": query.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(query, mask))
    assert not output[:, :, 3].any()


def test_what_onnx_has_no_operator_for_is_refused_by_name():
    rows, offsets = torch.randn(5, H, 4), torch.tensor([0, 2, 5])
    packed = Function(lambda rows: varlen_attention(rows, rows, rows, offsets, offsets).output)
    with pytest.raises(RuntimeError, match=r"reference: cannot: ONNX has no operator for packed sequences"):
        torch.onnx.export(packed, (rows,), io.BytesIO(), dynamo=False)
    module = MultiHeadAttention(E, H, batch_first=True).requires_grad_(False)
    cache, x = KeyValueCache(module, 2), torch.randn(2, 5, E)
    cached = Function(lambda x: module(x, x, x, cache=cache, need_weights=False)[0])
    with pytest.raises(ValueError, match=r"cache must be None in a model that is exported or traced"):
        torch.onnx.export(cached, (x,), io.BytesIO(), dynamo=False)
    assert cache.length == 0

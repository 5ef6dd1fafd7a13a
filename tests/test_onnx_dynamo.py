"""`torch.onnx.export(dynamo=True)`: every mask and option, at sizes that are not the example's.

What torch exports for ONNX is looked at everywhere. Where onnx, onnxscript and onnxruntime are installed
(``pip install ".[onnx]"``), it is translated and run too.
"""

import contextlib

import pytest
import torch
from torch import nn

import fused_mha
from calls import Function
from fused_mha import KeyValueCache, MultiHeadAttention, RotaryEmbedding, attention, scaled_dot_product_attention

E, H, D = 8, 4, 4
DYNAMIC = torch.export.Dim.DYNAMIC
EXAMPLE, SIZES = (2, 5, 7), ((2, 5, 7), (3, 7, 4), (1, 1, 1), (5, 2, 9))  # N, L, S
AXES = {
    "x": (0, 1),
    "y": (0, 1),
    "padding": (0, 1),
    "hidden": (0, 1),
    "bias": (0, 1),
    "query": (0, 1),
    "key": (0, 1),
    "value": (0, 1),
    "of_keys": (0, 1),
    "of_heads": (0, 2, 3),
}


def inputs(N, L, S):
    """A batch in which one sequence is padding alone, and masks that hide a row everywhere."""
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    hidden[L // 2] = True
    padding, of_keys = (torch.arange(length) >= torch.randint(1, length + 1, (N, 1)) for length in (L, S))
    padding[0] = of_keys[0] = True
    of_heads = torch.rand(N, H, L, S) > 0.6
    of_heads[:, 1, 0] = True
    x = torch.randn(N, L, E)
    return {
        "x": x,
        "y": torch.randn(N, S, E),
        "padding": padding,
        "hidden": hidden,
        "bias": torch.randn(L, L).masked_fill(hidden, float("-inf")),
        "query": torch.randn(N, L, H, D),
        "key": torch.randn(N, S, H, D),
        "value": torch.randn(N, S, H, 3),
        "of_keys": of_keys,
        "of_heads": of_heads,
    }


def made(**arguments):
    module = MultiHeadAttention(E, arguments.pop("num_heads", H), **({"batch_first": True} | arguments)).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def encoder():
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    fused_mha.convert(layer)
    return layer.eval()


def of_itself(m, t, **arguments):
    return m(t["x"], t["x"], t["x"], **arguments)


ALONE = {"need_weights": False}
EACH = {"average_attn_weights": False}
# Of modules: how one is made, and its call with inputs t.
MODULES = {
    "bool mask": (made, lambda m, t: of_itself(m, t, attn_mask=t["hidden"], **ALONE)),
    "window, float mask": (
        lambda: made(window=(1, 2)),
        lambda m, t: of_itself(m, t, attn_mask=t["bias"], **ALONE),
    ),
    "grouped heads, causal, padding": (
        lambda: made(num_kv_heads=2, head_dim=4, value_head_dim=2),
        lambda m, t: of_itself(m, t, key_padding_mask=t["padding"], is_causal=True, **ALONE),
    ),
    "rotary positions, norm, gate": (
        lambda: made(rope=RotaryEmbedding(2), qk_norm="rms", gate=True),
        lambda m, t: of_itself(m, t, is_causal=True, **ALONE),
    ),
    "virtual keys, norm": (
        lambda: made(add_bias_kv=True, add_zero_attn=True, qk_norm="l2"),
        lambda m, t: of_itself(m, t, key_padding_mask=t["padding"], attn_mask=t["hidden"], **ALONE),
    ),
    "cross-attention, kdim, vdim": (
        lambda: made(kdim=3, vdim=5),
        lambda m, t: m(t["x"], t["y"][..., :3], t["y"][..., :5], t["of_keys"], **ALONE),
    ),
    "sequence first": (
        lambda: made(batch_first=False),
        lambda m, t: m(t["x"].transpose(0, 1), *[t["y"].transpose(0, 1)] * 2, **ALONE),
    ),
    "encoder layer": (encoder, lambda m, t: (m(t["x"], src_mask=t["hidden"], src_key_padding_mask=t["padding"]),)),
}
# Of modules and of the core, those that no one operator of ONNX says.
MODULES_BY_STEPS = {
    "weights, virtual keys": (
        lambda: made(add_bias_kv=True, add_zero_attn=True),
        lambda m, t: of_itself(m, t, key_padding_mask=t["padding"], attn_mask=t["bias"], is_causal=True),
    ),
    "weights of each head": (made, lambda m, t: of_itself(m, t, attn_mask=t["hidden"], **EACH)),
    "weights of two heads, positions that are given, norm": (
        lambda: made(head_dim=4, num_kv_heads=2, rope=RotaryEmbedding(4, layout="interleaved"), qk_norm="layer"),
        lambda m, t: of_itself(m, t, positions=t["padding"].cumsum(1), weights_of_heads=(3, 0), **EACH),
    ),
    "softcap, sinks, ALiBi": (
        lambda: made(softcap=1.5, sinks=True, alibi=True),
        lambda m, t: of_itself(m, t, key_padding_mask=t["padding"], **ALONE),
    ),
    "weights, unbatched": (made, lambda m, t: m(t["x"][0], t["y"][0], t["y"][0], is_causal=True)),
}


def heads(t):
    return t["query"], t["key"], t["value"]


def heads_first(t):
    return (x.transpose(1, 2) for x in heads(t))


CORE = {
    "core, window at the bottom right": lambda t: attention(*heads(t), window=(1, 1), causal_alignment="bottom_right"),
    "core, masks": lambda t: attention(*heads(t), attn_mask=t["of_heads"], key_padding_mask=t["of_keys"]),
    "core, one row of a mask": lambda t: attention(*heads(t), attn_mask=t["of_heads"][:, :1, :1], scale=0.7),
    "core, bottom right": lambda t: attention(*heads(t), is_causal=True, causal_alignment="bottom_right"),
    "SDPA, one key head": lambda t: (
        scaled_dot_product_attention(
            *(x[:, :n] for x, n in zip(heads_first(t), (4, 1, 1), strict=True)), is_causal=True, enable_gqa=True
        ),
    ),
    "SDPA, bool mask": lambda t: (scaled_dot_product_attention(*heads_first(t), ~t["of_heads"]),),
    "SDPA, 3-D": lambda t: (scaled_dot_product_attention(t["x"], t["y"], t["y"], scale=0.7),),
}
CORE_BY_STEPS = {
    "core, sinks, log-sum-exp": lambda t: attention(
        *heads(t), attn_mask=t["of_heads"], sinks=torch.ones(H), return_lse=True, need_weights=True
    ),
    "core, log-sum-exp": lambda t: attention(*heads(t), key_padding_mask=t["of_keys"], return_lse=True),
    "core, softcap, ALiBi": lambda t: attention(
        *heads(t), softcap=2.0, alibi_slopes=torch.ones(H), causal_alignment="bottom_right", scale=0.7
    ),
    "packed and unpacked": lambda t: (fused_mha.unpack(fused_mha.pack(t["x"], t["padding"])[0] * 2, t["padding"]),),
}
ALL = (MODULES, MODULES_BY_STEPS, CORE, CORE_BY_STEPS)


class Calls(nn.Module):
    """Some of them, or all, so that one export serves."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(0)
        calls = {name: call for table in ALL for name, call in table.items() if not names or name in names}
        self.of_modules = nn.ModuleDict({name: call[0]() for name, call in calls.items() if isinstance(call, tuple)})
        self.calls = {name: call[1] if isinstance(call, tuple) else call for name, call in calls.items()}

    def forward(self, t):
        given = {
            name: call(self.of_modules[name], t) if name in self.of_modules else call(t)
            for name, call in self.calls.items()
        }
        return {name: tuple(x for x in results if x is not None) for name, results in given.items()}


def arguments_of(t):
    """What both of torch's exports take beside the model."""
    return {
        "args": (),
        "kwargs": {"t": t},
        "dynamic_shapes": {"t": {name: dict.fromkeys(AXES[name], DYNAMIC) for name in t}},
    }


@contextlib.contextmanager
def onnx_export():
    """What `torch.onnx.export` begins with, where its packages are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
        assert torch.onnx.is_in_onnx_export()
        yield


@pytest.fixture(scope="module")
def model():
    return Calls().eval()


SDPA = torch.ops.aten.scaled_dot_product_attention.default


def operators(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


def is_ours(node):
    return "fused_mha" in str(node.target)


def test_what_is_exported_has_operators_of_torch_alone(model):
    with onnx_export():
        program = torch.export.export(model, **arguments_of(inputs(*EXAMPLE)), strict=False)
    assert not [*filter(is_ours, operators(program))]
    served = [node for node in operators(program) if node.target == SDPA]
    assert len(served) == len(MODULES) + len(CORE)
    for query, _, _, *masks in (node.args for node in served):
        for mask in masks[:1]:  # onnxruntime asks for a row for each query
            assert mask is None or mask.meta["val"].shape[2] == query.meta["val"].shape[2]
    exported = program.module()
    for sizes in SIZES:
        t = inputs(*sizes)
        torch.testing.assert_close(exported(t=t), model(t))


def test_dynamo_notices_the_export(module, x):
    with onnx_export():
        program = torch.export.export(module, (x, x, x), {"is_causal": True}, strict=True)
    assert not [*filter(is_ours, operators(program))]


def results(onnx_program, given):
    """By the names of the outputs."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(onnx_program.model_proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    return [torch.from_numpy(x) for x in session.run(None, {x: given[x.removeprefix("t_")].numpy() for x in names})]


def assert_equal(model, onnx_program):
    wrong = {}
    for sizes in SIZES:
        t = inputs(*sizes)
        expected = [(name, x) for name, given in model(t).items() for x in given]
        found = results(onnx_program, t)
        assert len(found) == len(expected)
        for (name, x), y in zip(expected, found, strict=True):
            if x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4, atol=1e-5):
                wrong[name, sizes] = (x, y)
    assert not wrong


def test_onnxruntime_computes_what_the_model_does(model):
    pytest.importorskip("onnxscript")
    exported = torch.onnx.export(model, **arguments_of(inputs(*EXAMPLE)), dynamo=True, opset_version=24, optimize=False)
    nodes = [node.op_type for node in exported.model.graph]
    assert nodes.count("Attention") == len(MODULES) + len(CORE)
    assert_equal(model, exported)


def test_an_opset_without_attention_gives_the_same():
    pytest.importorskip("onnxscript")
    model = Calls("grouped heads, causal, padding", "virtual keys, norm", "core, masks", "SDPA, bool mask").eval()
    exported = torch.onnx.export(model, **arguments_of(inputs(*EXAMPLE)), dynamo=True, opset_version=18, verbose=False)
    assert "Attention" not in [node.op_type for node in exported.model.graph]
    assert_equal(model, exported)


def test_packed_sequences_are_refused_by_name():
    rows, offsets = torch.randn(5, H, D), torch.tensor([0, 2, 5])
    model = Function(lambda rows, offsets: fused_mha.varlen_attention(rows, rows, rows, offsets, offsets).output)
    with onnx_export(), pytest.raises(RuntimeError, match=r"reference: cannot: ONNX has no operator for packed seq"):
        torch.export.export(model, (rows, offsets), strict=False)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_a_cache_is_refused_in_what_is_exported_and_stays_as_it_was(module, x, strict):
    cache = KeyValueCache(module, x.shape[0])
    model = Function(lambda x: module(x, x, x, cache=cache, need_weights=False)[0])
    with pytest.raises(Exception, match="cache must be None in a model that is exported or traced"):
        torch.export.export(model, (x,), strict=strict)
    assert cache.length == 0
    model(x)

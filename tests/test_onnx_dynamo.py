"""`torch.onnx.export(dynamo=True)`: every mask and option, at sizes that are not the example's.

What torch exports for ONNX is looked at everywhere. Where onnx, onnxscript and onnxruntime are installed
(``pip install ".[onnx]"``), it is translated and run too.
"""

import io

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import KeyValueCache, MultiHeadAttention, RotaryEmbedding, attention, scaled_dot_product_attention

E, H, D = 8, 4, 4
DYNAMIC = torch.export.Dim.DYNAMIC
EXAMPLE, OTHERS = (2, 5, 7), ((2, 5, 7), (3, 7, 4), (1, 1, 1), (4, 2, 9))  # N, L, S
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


def module(**arguments):
    made = MultiHeadAttention(E, arguments.pop("num_heads", H), **({"batch_first": True} | arguments)).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def encoder():
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    fused_mha.convert(layer)
    return layer.eval()


ALONE = {"need_weights": False}
EACH = {"average_attn_weights": False}
# Of modules: how one is made, and its call with inputs t.
MODULES = {
    "no mask": (module, lambda m, t: m(t["x"], t["x"], t["x"], **ALONE)),
    "causal": (module, lambda m, t: m(t["x"], t["x"], t["x"], is_causal=True, **ALONE)),
    "bool mask": (module, lambda m, t: m(t["x"], t["x"], t["x"], attn_mask=t["hidden"], **ALONE)),
    "float mask": (module, lambda m, t: m(t["x"], t["x"], t["x"], attn_mask=t["bias"], **ALONE)),
    "padding": (module, lambda m, t: m(t["x"], t["x"], t["x"], key_padding_mask=t["padding"], **ALONE)),
    "grouped heads": (
        lambda: module(num_kv_heads=2, head_dim=4, value_head_dim=2),
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], is_causal=True, **ALONE),
    ),
    "window": (lambda: module(window=(1, 2)), lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], **ALONE)),
    "rotary positions, norm, gate": (
        lambda: module(rope=RotaryEmbedding(2), qk_norm="rms", gate=True),
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], is_causal=True, **ALONE),
    ),
    "interleaved positions that are given, norm": (
        lambda: module(num_heads=2, rope=RotaryEmbedding(4, layout="interleaved"), qk_norm="layer"),
        lambda m, t: m(t["x"], t["x"], t["x"], positions=t["padding"].cumsum(1), **ALONE),
    ),
    "virtual keys": (
        lambda: module(add_bias_kv=True, add_zero_attn=True, qk_norm="l2"),
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], attn_mask=t["hidden"], is_causal=True, **ALONE),
    ),
    "cross-attention, kdim, vdim": (
        lambda: module(kdim=3, vdim=5),
        lambda m, t: m(t["x"], t["y"][..., :3], t["y"][..., :5], t["of_keys"], **ALONE),
    ),
    "sequence first": (
        lambda: module(batch_first=False),
        lambda m, t: m(t["x"].mT.permute(2, 0, 1), *[t["y"].transpose(0, 1)] * 2, t["of_keys"], **ALONE),
    ),
    "unbatched": (module, lambda m, t: m(t["x"][0], t["y"][0], t["y"][0], **ALONE)),
    "encoder layer": (encoder, lambda m, t: (m(t["x"], src_mask=t["hidden"], src_key_padding_mask=t["padding"]),)),
}
# Of modules and of the core, those that no one operator of ONNX says.
MODULES_BY_STEPS = {
    "weights, virtual keys": (
        lambda: module(add_bias_kv=True, add_zero_attn=True),
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], attn_mask=t["bias"], is_causal=True),
    ),
    "weights of each head": (
        module,
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], attn_mask=t["hidden"], **EACH),
    ),
    "weights of two heads": (
        lambda: module(num_kv_heads=2),
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], weights_of_heads=(3, 0), **EACH),
    ),
    "softcap, sinks, alibi": (
        lambda: module(softcap=1.5, sinks=True, alibi=True),
        lambda m, t: m(t["x"], t["x"], t["x"], t["padding"], **ALONE),
    ),
    "weights, sequence first": (lambda: module(batch_first=False), lambda m, t: m(t["x"], t["x"], t["x"])),
    "weights, unbatched": (module, lambda m, t: m(t["x"][0], t["y"][0], t["y"][0], is_causal=True)),
}


def heads(t):
    return t["query"], t["key"], t["value"]


def heads_first(t):
    return (x.transpose(1, 2) for x in heads(t))


def with_past(t):
    """One step of decoding, as the documentation has it: y is in the past."""
    key, value = (torch.cat((t["key"], t["query"][..., : x.shape[-1]]), dim=1) for x in (t["key"], t["value"]))
    return attention(t["query"], key, value, is_causal=True, causal_alignment="bottom_right")


CORE = {
    "core, bottom right": lambda t: attention(*heads(t), is_causal=True, causal_alignment="bottom_right"),
    "core, window at the bottom right": lambda t: attention(*heads(t), window=(1, 1), causal_alignment="bottom_right"),
    "core, masks": lambda t: attention(*heads(t), attn_mask=t["of_heads"], key_padding_mask=t["of_keys"]),
    "core, one row of a mask": lambda t: attention(*heads(t), attn_mask=t["of_heads"][:, :1, :1], scale=0.7),
    "core, grouped heads": lambda t: attention(t["query"], t["key"][:, :, :1], t["value"][:, :, :1], is_causal=True),
    "core, past keys": with_past,
    "SDPA": lambda t: (scaled_dot_product_attention(*heads_first(t), is_causal=True),),
    "SDPA, bool mask": lambda t: (scaled_dot_product_attention(*heads_first(t), ~t["of_heads"]),),
    "SDPA, 3-D": lambda t: (scaled_dot_product_attention(t["x"], t["y"], t["y"], scale=0.7),),
    "SDPA, grouped heads": lambda t: (
        scaled_dot_product_attention(*(x[:, :n] for x, n in zip(heads_first(t), (4, 2, 2), strict=True)), enable_gqa=True),
    ),
}
CORE_BY_STEPS = {
    "core, sinks": lambda t: attention(
        *heads(t), key_padding_mask=t["of_keys"], sinks=torch.ones(H), return_lse=True, need_weights=True
    ),
    "core, log-sum-exp": lambda t: attention(*heads(t), attn_mask=t["of_heads"], return_lse=True),
    "core, softcap, ALiBi": lambda t: attention(
        *heads(t), softcap=2.0, alibi_slopes=torch.ones(H), causal_alignment="bottom_right", scale=0.7
    ),
    "packed and unpacked": lambda t: (fused_mha.unpack(fused_mha.pack(t["x"], t["padding"])[0] * 2, t["padding"]),),
}


class Calls(nn.Module):
    """All of them, so that one export serves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        calls = MODULES | MODULES_BY_STEPS
        self.modules_by_name = nn.ModuleDict({name.replace(".", ""): make() for name, (make, _) in calls.items()})
        self.calls = {name: call for name, (_, call) in calls.items()}

    def forward(self, **t):
        given = {name: call(self.modules_by_name[name], t) for name, call in self.calls.items()}
        given |= {name: call(t) for name, call in (CORE | CORE_BY_STEPS).items()}
        return {name: tuple(x for x in results if x is not None) for name, results in given.items()}


def dynamic_shapes(t):
    return {"t": {name: {axis: DYNAMIC for axis in AXES[name]} for name in t}}


@pytest.fixture
def in_onnx_export(monkeypatch):
    """What `torch.onnx.export` begins with, where its packages are not installed."""
    monkeypatch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
    assert torch.onnx.is_in_onnx_export()


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_what_is_exported_has_operators_of_torch_alone(in_onnx_export, monkeypatch):
    model, example = Calls(), inputs(*EXAMPLE)
    program = torch.export.export(model, (), example, dynamic_shapes=dynamic_shapes(example), strict=False)
    names = operators(program)
    assert not [name for name in names if "fused_mha" in name]
    assert names.count("aten.scaled_dot_product_attention.default") == len(MODULES) + len(CORE)
    monkeypatch.undo()
    for sizes in OTHERS:
        t = inputs(*sizes)
        torch.testing.assert_close(program.module()(**t), model(**t))

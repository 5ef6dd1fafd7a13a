"""A module with options by plain torch operators, one step after the other, and the comparison with ours.

It shares no code with the package: rotation is a product of complex numbers, masks are rules of positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import fused_mha
from closeness import assert_close_to_oracle, in_fp64

E, H = 12, 4
CALL = {
    "key_padding_mask": None,
    "attn_mask": None,
    "is_causal": False,
    "positions": None,
    "average_attn_weights": False,
}
EPS = {"rms": 1e-6, "layer": 1e-5, "l2": 1e-12}
# One at least of each option; every pair of two names that differ is a module too.
OPTIONS = {
    "fewer key heads": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "head sizes": {"head_dim": 6, "value_head_dim": 5},
    "window": {"window": (2, 1)},
    "window of the past": {"window": (1, None)},
    "rotary half": {"rope": fused_mha.RotaryEmbedding(2, base=100.0)},
    "rotary interleaved": {
        "head_dim": 8,
        "rope": fused_mha.RotaryEmbedding(6, base=50.0, layout="interleaved", scaling=fused_mha.LinearScaling(2.0)),
    },
    "rms": {"qk_norm": "rms"},
    "layer": {"qk_norm": "layer"},
    "l2": {"qk_norm": "l2"},
    "gate": {"gate": True},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "slopes": {"alibi": [0.5, 0.0, -0.25, 1.5]},
}
EVERYTHING = {
    "num_kv_heads": 2,
    "head_dim": 6,
    "value_head_dim": 5,
    "window": (3, 1),
    "softcap": 2.0,
    "sinks": True,
    "rope": fused_mha.RotaryEmbedding(4, layout="interleaved", scaling=fused_mha.YaRNScaling(2.0, 8)),
    "qk_norm": "layer",
    "alibi": True,
    "gate": True,
}


def module_with(dtype=torch.float32, **arguments):
    """Ours, batch first, of parameters that are all drawn."""
    module = fused_mha.MultiHeadAttention(E, H, batch_first=True, dtype=dtype, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn / (math.sqrt(E) if parameter.dim() == 2 else 1.0))
    return module


def _turned(x, positions, rope):
    """(N, L, H, D), positions (N, L)."""
    pairs = rope.dim // 2
    frequencies = [rope.base ** (-2 * j / rope.dim) for j in range(pairs)]
    if rope.scaling is not None:
        assert isinstance(rope.scaling, fused_mha.LinearScaling)  # the others have tests of their own
        frequencies = [f / rope.scaling.factor for f in frequencies]
    angles = positions.double()[..., None] * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = (f(angles).to(x.dtype)[:, :, None] for f in (torch.cos, torch.sin))
    halves = rope.layout == "half"
    first = list(range(pairs)) if halves else list(range(0, rope.dim, 2))
    second = [j + pairs for j in first] if halves else [j + 1 for j in first]
    columns = list(x.unbind(-1))
    for j, (a, b) in enumerate(zip(first, second, strict=True)):
        c, s = cos[..., j], sin[..., j]
        columns[a], columns[b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return torch.stack(columns, -1)


def _normed(x, kind, weight, bias):
    if kind == "rms":
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS[kind]) * weight
    if kind == "l2":
        return x / torch.sqrt((x**2).sum(-1, keepdim=True) + EPS[kind]) * weight
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS[kind])


def oracle(config, p, query, key, value, past=0, **call):
    """Output and weights of each head, by the module's arguments, its parameters by name, and those of a call.

    The first ``past`` tokens are no queries, but are keys.
    """
    call = CALL | call
    N, S = key.shape[:2]
    L = query.shape[1] - past
    H_kv = config.get("num_kv_heads") or H
    D = config.get("head_dim") or E // H
    D_v = config.get("value_head_dim") or D
    if "in_proj_weight" in p:
        weights = p["in_proj_weight"].split([H * D, H_kv * D, H_kv * D_v])
    else:
        weights = [p[f"{x}_proj_weight"] for x in "qkv"]
    biases = [None] * 3
    if "in_proj_bias" in p:
        biases = p["in_proj_bias"].split([H * D, H_kv * D, H_kv * D_v])
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    q, k, v = q.unflatten(-1, (H, D)), k.unflatten(-1, (H_kv, D)), v.unflatten(-1, (H_kv, D_v))
    if norm := config.get("qk_norm"):
        q = _normed(q, norm, p["q_norm_weight"], p.get("q_norm_bias"))
        k = _normed(k, norm, p["k_norm_weight"], p.get("k_norm_bias"))
    if rope := config.get("rope"):
        positions = torch.arange(S) if call["positions"] is None else call["positions"]
        positions = positions.expand(N, S)
        q, k = _turned(q, positions, rope), _turned(k, positions, rope)
    q, query = q[:, past:], query[:, past:]
    virtual = 0
    if "bias_k" in p:
        k = torch.cat((k, p["bias_k"].view(1, 1, H_kv, D).expand(N, 1, H_kv, D)), 1)
        v = torch.cat((v, p["bias_v"].view(1, 1, H_kv, D_v).expand(N, 1, H_kv, D_v)), 1)
        virtual += 1
    if config.get("add_zero_attn"):
        k, v = (torch.cat((x, torch.zeros_like(x[:, :1])), 1) for x in (k, v))
        virtual += 1
    k, v = (x.repeat_interleave(H // H_kv, 2) for x in (k, v))
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * D**-0.5
    if (softcap := config.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(L)[:, None] + past, torch.arange(S)
    if slopes := config.get("alibi"):
        slopes = [2 ** (-8 * (h + 1) / H) for h in range(H)] if slopes is True else slopes
        distances = (i - j).abs() * torch.tensor(slopes, dtype=torch.float64)[:, None, None]
        scores = scores - F.pad(distances, (0, virtual)).to(scores.dtype)
    hidden = torch.zeros(N, H, L, S, dtype=torch.bool)
    left, right = config.get("window") or (None, None)
    if left is not None:
        hidden |= j < i - left
    if right is not None:
        hidden |= j > i + right
    if call["is_causal"]:
        hidden |= j > i
    padding = call["key_padding_mask"]
    for mask in (call["attn_mask"], None if padding is None else padding[:, None, None]):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            hidden = hidden | mask
        else:
            hidden = hidden | (mask == float("-inf"))
            scores = scores + F.pad(mask.masked_fill(mask == float("-inf"), 0.0).to(scores.dtype), (0, virtual))
    hidden = F.pad(hidden, (0, virtual))
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden & ~empty, float("-inf"))
    if "sinks" in p:
        scores = torch.cat((scores, p["sinks"].view(1, H, 1, 1).expand(N, H, L, 1)), -1)
    weights = torch.softmax(scores, -1)[..., : S + virtual].masked_fill(empty, 0.0)
    heads = torch.einsum("nhls,nshd->nlhd", weights, v).flatten(2)
    if config.get("gate"):
        heads = torch.sigmoid(F.linear(query, p["gate_proj_weight"], p.get("gate_proj_bias"))) * heads
    output = F.linear(heads, p["out_proj.weight"], p.get("out_proj.bias"))
    return output, weights.mean(1) if call["average_attn_weights"] else weights


def with_gradients(function, parameters, inputs):
    """Output, weights and the gradients of parameters and of each different input, by name.

    ``function`` takes the parameters by name and query, key and value.
    """
    parameters = {name: x.detach().clone().requires_grad_() for name, x in parameters.items()}
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    output, weights = function(parameters, *(leaves[id(x)] for x in inputs))
    found = {"output": output, "weights": weights}
    found = {name: x for name, x in found.items() if x is not None}
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in found.values()]
    wanted = {**parameters, **{f"input {i}": x for i, x in enumerate(leaves.values())}}
    gradients = torch.autograd.grad([*found.values()], [*wanted.values()], cotangents, allow_unused=True)
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"grad of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return {name: x.detach() for name, x in found.items()}


def as_function(module, **call):
    """The module as a function of its parameters and inputs."""

    def function(parameters, *inputs):
        return torch.func.functional_call(module, parameters, inputs, call)

    return function


def assert_matches(module, config, inputs, need_weights=True, **call):
    """Compare a module's call with the oracle, outputs, weights and every gradient."""
    call = CALL | call
    function = as_function(module, need_weights=need_weights, **call)
    parameters = dict(module.named_parameters())
    ours = with_gradients(function, parameters, inputs)
    dtype = ours["output"].dtype

    def by_oracle(parameters, *inputs):
        output, weights = oracle(config, parameters, *inputs, **call)
        return output, weights if need_weights else None

    def exact():
        wide = {id(x): x.double() for x in inputs}
        return with_gradients(by_oracle, in_fp64(parameters), [wide[id(x)] for x in inputs])

    coarse = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    narrow = {id(x): x.to(coarse) for x in inputs}
    as_coarse = {name: x.to(coarse) for name, x in parameters.items()}
    theirs = with_gradients(by_oracle, as_coarse, [narrow[id(x)] for x in inputs])
    N, S = inputs[1].shape[:2]
    assert_close_to_oracle(ours, theirs, exact, N * S * S, dtype)

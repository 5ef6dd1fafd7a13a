"""Attention by whole (N, H, L, S') tensors: in fp64 the oracle of the native tests, in other dtypes "torch's own".

It shares no line with `fused_mha`; `test_forward` holds it against the loops of `attention_oracle`.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_mha
from attention_oracle import DEFAULTS, longest_sums, returned_weights, run_with_gradients
from closeness import assert_close_to_oracle
from fused_mha.core.inputs import AttentionResult
from native.philox import drawn_probability

INF = float("inf")
HALF = (torch.float16, torch.bfloat16)


def _padded(mask: Tensor, width: int) -> Tensor:
    return F.pad(mask, (0, width - mask.shape[-1]))


def hidden_and_added(a, width):
    """What hides and what is added to the scores, each (N, H, L, S'); additive masks in fp64."""
    (N, L, H, _), S = a["query"].shape, a["key"].shape[1]
    i, j = torch.arange(L)[:, None], torch.arange(S)[None, :]
    position = i + (S - L if a["causal_alignment"] == "bottom_right" else 0)
    left, right = a["window"] or (None, None)
    hidden = torch.zeros(L, S, dtype=torch.bool)
    if a["is_causal"]:
        hidden |= j > position
    if left is not None:
        hidden |= j < position - left
    if right is not None:
        hidden |= j > position + right
    hidden = hidden.expand(N, H, L, S)
    added = torch.zeros(1, 1, 1, S, dtype=torch.float64)
    padding = a["key_padding_mask"]
    for mask in (a["attn_mask"], None if padding is None else padding[:, None, None]):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            hidden = hidden | mask
        else:
            hidden = hidden | (mask == -INF)
            added = added + mask.double().masked_fill(mask == -INF, 0.0)
    return _padded(hidden, width), _padded(added, width)


def _with_virtual(x, bias, add_zero_attn, group, hidden_keys):
    if hidden_keys is not None:
        x = x.masked_fill(hidden_keys[:, :, None, None], 0.0)
    parts = [x] if bias is None else [x, bias.expand(x.shape[0], 1, -1, -1)]
    if add_zero_attn:
        parts.append(x.new_zeros(x.shape[0], 1, *x.shape[2:]))
    return torch.cat(parts, dim=1).repeat_interleave(group, dim=2).transpose(1, 2)


def dense_attention(keep=None, **arguments):
    """`fused_mha.attention` in the dtype of its arguments; `keep` (N, H, L, S') is dropout's mask, True = keep."""
    a = DEFAULTS | arguments
    query, key, padding = a["query"], a["key"], a["key_padding_mask"]
    D, group = query.shape[3], query.shape[2] // key.shape[2]
    dtype = query.dtype
    hidden_keys = None
    if padding is not None:
        hidden_keys = padding if padding.dtype == torch.bool else padding == -INF
    q = query.transpose(1, 2)
    k = _with_virtual(key, a["bias_k"], a["add_zero_attn"], group, hidden_keys)
    v = _with_virtual(a["value"], a["bias_v"], a["add_zero_attn"], group, hidden_keys)
    hidden, added = hidden_and_added(a, k.shape[2])
    scale = D**-0.5 if a["scale"] is None else a["scale"]
    slopes, softcap, sinks = a["alibi_slopes"], a["softcap"], a["sinks"]
    if slopes is not None:
        L, S = query.shape[1], key.shape[1]
        position = torch.arange(L)[:, None] + (S - L if a["causal_alignment"] == "bottom_right" else 0)
        distances = _padded((position - torch.arange(S)).abs(), k.shape[2])
        added = added - slopes.to(torch.promote_types(dtype, torch.float32))[:, None, None] * distances
    wants_more = a["need_weights"] or a["weights_of_heads"] or a["return_lse"]
    wants_more = wants_more or softcap is not None or sinks is not None or keep is not None
    if not wants_more and dtype != torch.float64 and q.numel() and k.numel():  # fp64: the oracle, by formula
        bias = added.to(dtype).masked_fill(hidden, -INF)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return AttentionResult(output.transpose(1, 2), None, None)
    empty = hidden.all(dim=-1, keepdim=True)
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    scores = scores + added.to(dtype)
    scores = scores.masked_fill(hidden & ~empty, -INF)
    of_empty = torch.tensor(-INF)
    if sinks is not None:
        of_empty = sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, of_empty), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]].masked_fill(empty, 0.0)
    if keep is not None:
        p = drawn_probability(a["dropout_p"])
        weights = weights * keep.to(dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)
    lse = None
    if a["return_lse"]:
        lse = torch.where(empty, of_empty, torch.logsumexp(scores, dim=-1, keepdim=True))[..., 0]
    return AttentionResult((weights @ v).transpose(1, 2), returned_weights(a, weights), lse)


@contextlib.contextmanager
def drawn_seed(*seed: int):
    """Let dropout draw this seed."""

    def draw(*_, device=None, **__):
        return torch.tensor(seed, dtype=torch.int64, device=device)

    with mock.patch.object(torch, "randint", side_effect=draw):
        yield


def native_attention(*tensors, **arguments):
    """`fused_mha.attention` on the CPU library, which nothing may replace."""
    with fused_mha.backend("cpu"):
        return fused_mha.attention(*tensors, **arguments)


def assert_matches_dense(arguments, keep=None, through=("output", "weights", "lse"), attention=native_attention):
    """Results and gradients of the CPU library, or another, against the oracle, by the one rule; returns the former."""

    def dense(**a):
        return dense_attention(keep, **a)

    ours = run_with_gradients(attention, arguments, through=through)
    dtype = arguments["query"].dtype
    theirs = run_with_gradients(dense, arguments, through=through)
    if dtype in HALF and "lse" in theirs:  # the log-sum-exp is fp32
        theirs["lse"] = run_with_gradients(dense, arguments, torch.float32, through)["lse"]
    for name, x in ours.items():
        given = arguments.get(name.removeprefix("grad of "))
        if given is not None:
            assert x.dtype == given.dtype, name
        else:
            single = torch.float32 if dtype in HALF else dtype
            assert x.dtype == (single if name == "lse" else dtype), name
    assert_close_to_oracle(
        ours,
        theirs,
        lambda: run_with_gradients(dense, arguments, torch.float64, through),
        longest_sums(arguments, ours),
        dtype,
    )
    return ours


def assert_forward_matches_dense(arguments, keep=None):
    """The results of the CPU library alone, without gradients, against the oracle."""

    def results(function, dtype=None):
        cast = {
            name: x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
        return {name: x for name, x in function(**cast)._asdict().items() if x is not None}

    def dense(**a):
        return dense_attention(keep, **a)

    dtype = arguments["query"].dtype
    ours, theirs = results(native_attention), results(dense)
    if "lse" in theirs and dtype in HALF:
        theirs["lse"] = results(dense, torch.float32)["lse"]
    assert_close_to_oracle(ours, theirs, lambda: results(dense, torch.float64), longest_sums(arguments, ours), dtype)

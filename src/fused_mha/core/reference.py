"""Attention in readable PyTorch: the oracle of the tests, and the core for any device, dtype and transform.

`dispatch` calls it where no faster back end can serve. The half types are computed in fp32.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha.core import masks
from fused_mha.core.modes import is_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fused_mha.core.inputs import CausalAlignment, Window


def append_virtual_keys(keys: Tensor, bias: Tensor | None, add_zero_attn: bool) -> Tensor:
    """Keys or values (N, S, H_kv, D) with the bias (H_kv, D), then a zero, after the S real ones."""
    N = keys.shape[0]
    parts = [keys]
    if bias is not None:
        parts.append(bias.to(keys.dtype).expand(N, 1, -1, -1))
    if add_zero_attn:
        parts.append(keys.new_zeros(N, 1, keys.shape[2], keys.shape[3]))
    return torch.cat(parts, dim=1) if len(parts) > 1 else keys


def heads_first(x: Tensor, num_heads: int) -> Tensor:
    """(N, S, H_kv, D) -> (N * num_heads, S, D), each key head repeated for the queries that share it."""
    N, S, H_kv, D = x.shape
    if H_kv != num_heads:
        x = x.repeat_interleave(num_heads // H_kv, dim=2)
    return x.transpose(1, 2).reshape(N * num_heads, S, D)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    window: Window | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    return_lse: bool = False,
    weights_of_heads: Sequence[int] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax(cap(query @ key^T * scale) + ALiBi + masks) @ value, dropout between, on checked arguments.

    The arguments are those of `fused_mha.attention`, with 4-D ``attn_mask`` and a given ``scale``. ``dropout_mask``,
    bool (N, H, L, S'), True = keep, replaces the random draw; without it dropout draws what `F.dropout` does on an
    (N * H, L, S') tensor, as torch's module draws. With offsets of packed sequences it has an element for each of them.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        of_sequence = functools.partial(
            attention,
            is_causal=is_causal,
            causal_alignment=causal_alignment,
            window=window,
            bias_k=bias_k,
            bias_v=bias_v,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            add_zero_attn=add_zero_attn,
            dropout_p=dropout_p,
            scale=scale,
            softcap=softcap,
            return_lse=return_lse,
        )
        virtual_keys = int(bias_k is not None) + int(add_zero_attn)
        tensors = (query, key, value, key_padding_mask, dropout_mask)
        return _of_sequences(of_sequence, virtual_keys, *tensors, cu_seqlens_q, cu_seqlens_k)
    N, L, H, _ = query.shape
    S = key.shape[1]
    out_dtype = query.dtype
    dtype = torch.float32 if out_dtype in (torch.float16, torch.bfloat16) else out_dtype
    key = append_virtual_keys(key, bias_k, add_zero_attn)
    value = append_virtual_keys(value, bias_v, add_zero_attn)
    virtual_keys = key.shape[1] - S

    bias = masks.attention_bias(
        L,
        S,
        attn_mask,
        key_padding_mask,
        is_causal,
        causal_alignment,
        window,
        virtual_keys,
        dtype,
        query.device,
    )
    empty = None
    if bias is not None and not virtual_keys:
        bias, empty = masks.without_empty_rows(bias)  # of [N|1, H|1, L|1, 1]

    if dtype != out_dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q = heads_first(query, H) * scale  # [N * H, L, D]
    k = heads_first(key, H)  # [N * H, S', D]
    v = heads_first(value, H)  # [N * H, S', D_v]
    if alibi_slopes is not None:
        alibi = masks.alibi_bias(alibi_slopes.to(dtype), L, S, causal_alignment, virtual_keys)  # [1, H, L, S']
        bias = alibi if bias is None else bias + alibi
    if softcap is not None:
        scores = torch.tanh(torch.bmm(q, k.transpose(1, 2)) / softcap) * softcap  # [N * H, L, S']
        scores = scores if bias is None else scores + _batch_of_heads(bias, N, H)
    elif bias is None:
        scores = torch.bmm(q, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(_batch_of_heads(bias, N, H), q, k.transpose(1, 2))
    if sinks is not None:  # a last column, whose weight counts for nothing
        sinks = sinks.to(dtype).view(1, H, 1, 1)
        scores = torch.cat((scores, sinks.expand(N, H, L, 1).flatten(0, 1)), dim=2)
    lse = _log_sum_exp(scores.unflatten(0, (N, H)), empty, sinks) if return_lse else None

    weights = _softmax(scores)
    if sinks is not None:
        weights = weights[:, :, :-1]
    if dropout_mask is not None:
        kept = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        weights = weights * (dropout_mask.flatten(0, 1).to(dtype) * kept)
    elif dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    output = torch.bmm(weights, v).view(N, H, L, v.shape[2]).transpose(1, 2)  # [N, L, H, D_v]
    if empty is not None:
        output = output.masked_fill(empty.transpose(1, 2), 0.0)

    returned_weights = None
    if need_weights:
        weights = weights.view(N, H, L, k.shape[1])
        if weights_of_heads is not None:
            weights = weights[:, list(weights_of_heads)]
            empty = empty if empty is None or empty.shape[1] == 1 else empty[:, list(weights_of_heads)]
        returned_weights = _visible_weights(weights, empty, average_attn_weights).to(out_dtype)
    return output.to(out_dtype), returned_weights, lse


def _of_sequences(
    of_sequence: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]],
    virtual_keys: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    dropout_mask: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> tuple[Tensor, None, Tensor | None]:
    """`attention` of each packed sequence; the rows behind the last see nothing."""
    queries = _bounds("cu_seqlens_q", cu_seqlens_q, query.shape[1])
    keys = _bounds("cu_seqlens_k", cu_seqlens_k, key.shape[1])
    if virtual_keys and queries[-1] != query.shape[1]:
        raise RuntimeError("beside virtual keys, packed sequences must have all of the queries")
    parts = [*zip(map(slice, queries, queries[1:]), map(slice, keys, keys[1:]), strict=True)]
    rest = (slice(queries[-1], query.shape[1]), slice(0, 0))
    outputs, lses = [], []
    for n, (q, k) in enumerate([*parts, rest]):
        padding = None if key_padding_mask is None else key_padding_mask[:, k]
        kept = None
        if dropout_mask is not None and n < len(parts):
            kept = dropout_mask[n : n + 1, :, : q.stop - q.start, : k.stop - k.start + virtual_keys]
        output, _, lse = of_sequence(query[:, q], key[:, k], value[:, k], key_padding_mask=padding, dropout_mask=kept)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=1), None, None if lses[0] is None else torch.cat(lses, dim=2)


def _bounds(name: str, offsets: Tensor, rows: int) -> list[int]:
    # On meta there are no values: results have the shapes of one sequence.
    bounds = [0, rows] if offsets.is_meta else offsets.tolist()
    if bounds[0] != 0:
        raise RuntimeError(f"{name} must begin with 0; got {bounds[0]}")
    for n, (before, bound) in enumerate(itertools.pairwise(bounds), 1):
        if bound < before:
            raise RuntimeError(f"{name} must not descend; got {bound} behind {before} at {n}")
        if bound > rows:
            raise RuntimeError(f"{name} must not reach beyond the {rows} tokens there are; got {bound} at {n}")
    return bounds


def _visible_weights(weights: Tensor, empty: Tensor | None, average: bool) -> Tensor:
    """(N, H, L, S'), zeros where ``empty`` (N|1, H|1, L|1, 1), or the mean of this over the heads."""
    if empty is not None and (empty.shape[1] > 1 or not average):
        weights, empty = weights.masked_fill(empty, 0.0), None
    if average:
        weights = weights.mean(dim=1)
        if empty is not None:
            weights = weights.masked_fill(empty[:, 0], 0.0)  # H times less to fill than before the mean
    return weights


def _batch_of_heads(bias: Tensor, N: int, H: int) -> Tensor:
    """(N|1, H|1, L|1, S') as the first argument of `torch.baddbmm`, with a copy only where N and H both matter."""
    if bias.shape[0] == bias.shape[1] == 1:
        return bias[0]
    return bias.expand(N, H, -1, -1).flatten(0, 1)


def _softmax(scores: Tensor) -> Tensor:
    # In inference the weights take the place of the scores: new memory of this size costs more than the softmax.
    if is_plain(scores):
        return torch.softmax(scores, dim=-1, out=scores)
    return torch.softmax(scores, dim=-1)


def _log_sum_exp(scores: Tensor, empty: Tensor | None, sinks: Tensor | None) -> Tensor:
    """The log-sum-exp of (N, H, L, S') over S'; on empty rows that of the sinks (1, H, 1, 1), -inf without."""
    lse = torch.logsumexp(scores, dim=-1)
    if empty is None:
        return lse
    if sinks is not None:
        return torch.where(empty[..., 0], sinks[..., 0], lse)
    return lse.masked_fill(empty[..., 0], masks.NEGATIVE_INFINITY)

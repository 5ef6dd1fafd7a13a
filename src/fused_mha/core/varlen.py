"""`varlen_attention`: attention over packed sequences of different lengths, with no padding computed.

Users call it; `module.nested` takes offsets by `offsets_of`. `packing` makes packed rows of a padded batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_mha.core import plans
from fused_mha.core.inputs import AttentionInputs, AttentionResult, CausalAlignment, Window, check_attention
from fused_mha.core.modes import as_autocast_casts, autocast_is_on, recordable


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    window: Window | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> AttentionResult:
    """`attention` of each of several sequences, whose tokens lie packed one sequence behind the other.

    Sequence n has the queries ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1] - 1`` and the keys likewise, and its result
    is that of `attention` on these rows alone. A sequence may be empty. Rows behind the last sequence give zeros.

    T_q queries and T_k keys in all, H query heads, H_kv key/value heads, D head size. There are no weights, no
    ``attn_mask`` and no virtual keys: `attention` on a padded batch has those.

    Args:
        query: (T_q, H, D), any strides.
        key: (T_k, H_kv, D); H is a multiple of H_kv.
        value: (T_k, H_kv, D_v).
        cu_seqlens_q: (sequences + 1), int32 or int64, on query's device: where each sequence begins; 0 first, never
            less than the one before, at most T_q. On CUDA these values are not checked, since the host would have to
            wait for them: wrong offsets give any results there, and no memory outside the tensors is read or written.
        cu_seqlens_k: (sequences + 1), likewise for the keys.
        key_padding_mask: (T_k), bool (True = ignore) or floating (added to the scores).
        is_causal: as in `attention`, within each sequence.
        causal_alignment: likewise, by the lengths of each sequence.
        window: likewise.
        sinks: (H), as in `attention`.
        alibi_slopes: (H), as in `attention`.
        dropout_p: as in `attention`. Under one seed of the fused cores, sequence n drops what element n of a padded
            batch does.
        scale: as in `attention`.
        softcap: as in `attention`.
        return_lse: return the log-sum-exp too.

    Returns:
        ``AttentionResult(output, None, lse)``: output (T_q, H, D_v) in query's dtype; lse (H, T_q) in fp32 (fp64 for
        fp64), or None.

    Raises:
        RuntimeError: ranks, shapes, dtypes or devices that disagree, or, of a core that reads them on the host, offsets
            that do not begin with 0, descend or reach beyond the tokens.
        ValueError: as `attention`.
        TypeError: an argument that has to be a tensor is none.

    Examples:
        >>> query, key, value = (torch.randn(9, 4, 8) for _ in range(3))
        >>> lengths = torch.tensor([0, 2, 2, 9])  # of 2, 0 and 7 tokens
        >>> fused_mha.varlen_attention(query, key, value, lengths, lengths, is_causal=True).output.shape
        torch.Size([9, 4, 8])

    Source:
        `torch.nn.attention.varlen.varlen_attn`; for the layout, flash-attn's ``flash_attn_varlen_func``.
    """
    _check_shapes(query, key, value, key_padding_mask)
    device = query.device.type
    if autocast_is_on(device):
        query, key, value = (as_autocast_casts(x) for x in (query, key, value))
    inputs = check_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.unsqueeze(0),
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
    )
    inputs = of_sequences(inputs, cu_seqlens_q, cu_seqlens_k)
    output, _, lse = plans.run(inputs)
    return AttentionResult(output.squeeze(0), None, None if lse is None else lse.squeeze(0))


_LAYOUT = {3: "(tokens, heads, head size)", 1: "(tokens)"}


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise, by the shapes that were given, where `check_attention` would by those of a batch of one."""
    for name, x, dims in (
        ("query", query, 3),
        ("key", key, 3),
        ("value", value, 3),
        ("key_padding_mask", key_padding_mask, 1),
    ):
        if not isinstance(x, Tensor) and not (x is None and name == "key_padding_mask"):
            raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}")
        if x is not None and (x.is_nested or x.dim() != dims):
            raise RuntimeError(f"{name} must be {dims}-D, {_LAYOUT[dims]}; got shape {_shape(x)}")
    D, (T_k, H_kv, D_k) = query.shape[2], key.shape
    if D == 0:
        raise RuntimeError(f"query must have a head size of at least 1; got shape {_shape(query)}")
    if D_k != D:
        raise RuntimeError(
            f"key must have shape (T_k, H_kv, D) with query's D = {D}; got {_shape(key)}, query is {_shape(query)}"
        )
    if value.shape[:2] != (T_k, H_kv):
        raise RuntimeError(
            f"value must have shape (T_k, H_kv, D_v) with key's (T_k, H_kv) = {(T_k, H_kv)}; got {_shape(value)}"
        )
    if key_padding_mask is not None and key_padding_mask.shape[0] != T_k:
        raise RuntimeError(f"key_padding_mask must have shape (T_k,) = ({T_k},); got {_shape(key_padding_mask)}")


def of_sequences(inputs: AttentionInputs, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> AttentionInputs:
    """The call of one batch element as one of packed sequences, whose offsets are checked but for their values."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}: torch.as_tensor makes one of a list")
        if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"{name} must be 1-D, of dtype int32 or int64; got shape {_shape(x)}, {x.dtype}")
        if x.device != inputs.query.device:
            raise RuntimeError(f"{name} must be on query's device, {inputs.query.device}; got {x.device}")
    sizes = (cu_seqlens_q.shape[0], cu_seqlens_k.shape[0])
    if sizes[0] != sizes[1] or sizes[0] == 0:
        raise RuntimeError(
            f"cu_seqlens_q and cu_seqlens_k must both have one element more than there are sequences; got {sizes[0]} "
            f"and {sizes[1]}"
        )
    of_queries = offsets_of(cu_seqlens_q)
    of_keys = of_queries if cu_seqlens_k is cu_seqlens_q else offsets_of(cu_seqlens_k)
    return inputs._replace(cu_seqlens_q=of_queries, cu_seqlens_k=of_keys)


def offsets_of(cu_seqlens: Tensor) -> Tensor:
    """As the operators take them, and autograd may save them."""
    return recordable(cu_seqlens).to(torch.int64)


def _shape(x: Tensor) -> tuple[int, ...] | str:
    return "of a nested tensor" if x.is_nested else tuple(x.shape)

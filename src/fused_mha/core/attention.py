"""`attention`: scaled dot-product attention on split heads, the public function behind the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_mha.core import dispatch, plans
from fused_mha.core.inputs import AttentionResult, CausalAlignment, Window, check_attention
from fused_mha.core.modes import as_autocast_casts, autocast_is_on


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
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
    scale: float | None = None,
    softcap: float | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    return_lse: bool = False,
    weights_of_heads: Sequence[int] | None = None,
) -> AttentionResult:
    """Scaled dot-product attention of split heads: softmax(query @ key^T * scale + masks) @ value.

    Two things differ from torch's `scaled_dot_product_attention`: the layout is (N, L, H, D), not (N, H, L, D), and in
    a mask True means *ignore*, as in `torch.nn.MultiheadAttention`, not *attend*. A row that is hidden everywhere gives
    zeros (output, weights and gradients) and a log-sum-exp of -inf. A key that ``key_padding_mask`` hides is never
    read, not even if it is NaN.

    N batch, H query heads, H_kv key/value heads, L query length, S key length, D head size. All floating dtypes; the
    half types are computed in fp32. Under `torch.autocast`, query, key, value and the biases are cast as torch's SDPA
    casts them.

    Args:
        query: (N, L, H, D), any strides.
        key: (N, S, H_kv, D); H is a multiple of H_kv, and query head h reads key head h // (H / H_kv).
        value: (N, S, H_kv, D_v).
        attn_mask: (L|1, S) or (N|1, H|1, L|1, S), bool (True = ignore) or any floating dtype (added to the scores).
        key_padding_mask: (N, S), bool (True = ignore) or any floating dtype (added to the scores).
        is_causal: hide the future; applies together with the masks. For L = 2, S = 4 the visible keys are:

                top_left     1 0 0 0      bottom_right     1 1 1 0
                             1 1 0 0                       1 1 1 1

        causal_alignment: ``"top_left"``, as torch, or ``"bottom_right"``, for the last L queries of S.
        window: (left, right), how many keys before and after its own position a query sees; None is no limit.
        bias_k: (H_kv, D), a virtual key after the S real ones, visible to every query.
        bias_v: (H_kv, D_v), its value.
        sinks: (H), any floating dtype, a logit for each head that is in the sum of the softmax and gives no value: the
            weights of a row sum to less than 1. It is in the log-sum-exp too, and is all of it in a hidden row.
        alibi_slopes: (H), any floating dtype: -slope * |p - j| is added to the score of key j, where p is the query's
            position, i or, with ``causal_alignment="bottom_right"``, i + S - L; nothing for virtual keys.
        add_zero_attn: append a virtual key and value of zeros, visible to every query.
        dropout_p: probability p of dropping a weight; the others are scaled by 1 / (1 - p). Always applied; the fused
            cores round p to a multiple of 2^-16 (below 1 if it is), and scale by what they round it to.
        scale: factor of the scores; 1 / sqrt(D) if None.
        softcap: c: a scaled score s becomes c * tanh(s / c), before ALiBi and masks.
        need_weights: return the attention weights too, after dropout.
        average_attn_weights: the weights' mean over the heads, (N, L, S'), not per head, (N, H, L, S').
        return_lse: return the log-sum-exp of the scores too, (N, H, L), before dropout.
        weights_of_heads: heads of the query, each once, such as ``(0, 3)``: return the weights of these n heads alone,
            (N, n, L, S'), in this order and at a price in proportion. ``need_weights`` may be left out.

    Returns:
        ``AttentionResult(output, weights, lse)``: output (N, L, H, D_v) in query's dtype; weights in query's dtype,
        S' = S plus the number of virtual keys, or None; lse in fp32 (fp64 for fp64), natural logarithm, or None.

    Raises:
        RuntimeError: ranks, shapes, dtypes or devices that disagree, or no back end can serve the call.
        ValueError: ``dropout_p`` outside [0, 1], an unknown ``causal_alignment``, a negative ``window``, a ``softcap``
            that is not positive, ``weights_of_heads`` that are empty, name a head twice, or stand beside averaged
            weights.
        IndexError: ``weights_of_heads`` has a head that is not there.
        TypeError: ``weights_of_heads`` is no sequence of ints.

    Examples:
        >>> query, key, value = (torch.randn(2, 5, 4, 8) for _ in range(3))
        >>> output, weights, _ = fused_mha.attention(query, key, value, is_causal=True, need_weights=True)
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 5]))

    Source:
        Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), equation 1;
        `torch.nn.functional.scaled_dot_product_attention`; for ``alibi_slopes`` Press et al. (arXiv 2108.12409), for
        ``softcap`` Gemma 2 (arXiv 2408.00118), section 2, for ``sinks`` gpt-oss (arXiv 2508.10925), section 2.2.
    """
    device = query.device.type
    if autocast_is_on(device):
        query, key, value = (as_autocast_casts(x) for x in (query, key, value))
        bias_k, bias_v = (None if x is None else as_autocast_casts(x) for x in (bias_k, bias_v))
    kind = None
    if device == plans.DEVICE and not torch.compiler.is_compiling():
        tensors = (query, key, value, sinks, alibi_slopes, attn_mask, key_padding_mask, bias_k, bias_v)
        typed = None  # those whose checks refuse False, which is equal to 0
        if not (window is softcap is weights_of_heads is None):
            typed = f"{window!r} {softcap!r} {weights_of_heads!r}"
        flags = (is_causal, causal_alignment, add_zero_attn, dropout_p, scale, need_weights, average_attn_weights)
        kind, served = plans.find(tensors, (*flags, return_lse, typed))
        if served is not None:
            if attn_mask is not None and attn_mask.dim() == 2:  # as the checks of a first call leave it
                attn_mask = attn_mask[None, None]
            return served(query, key, value, sinks, alibi_slopes, attn_mask, key_padding_mask, bias_k, bias_v)
    inputs = check_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
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
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        return_lse=return_lse,
        weights_of_heads=weights_of_heads,
    )
    back_end = dispatch.choose(inputs)
    if (served := plans.keep(kind, back_end, inputs)) is not None:
        return served(*plans.tensors_of(inputs))
    return dispatch.run(back_end, inputs)

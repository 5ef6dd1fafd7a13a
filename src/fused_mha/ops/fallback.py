"""The operators by the reference core: for graphs of inference that were exported with them, on a device or machine
without kernels.

`autograd` differentiates the same function for the second derivative. Eager calls come here only by way of it:
`dispatch` leaves a call that no kernel serves to another back end.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fused_mha.core import masks, reference
from fused_mha.core.modes import autocast_is_on
from fused_mha.ops import schema
from fused_mha.ops.schema import Arguments


def reference_attention(a: Arguments) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, weights or None, and log-sum-exp, differentiable as often as one likes."""
    N, L, H, _ = a.query.shape
    key, value = a.key, a.value
    if a.key_padding_mask is not None:
        key, value = masks.without_hidden_keys(key, value, a.key_padding_mask)
    dropout_mask = None
    if a.seed is not None:
        shape = (N, H, L, a.columns)
        if a.cu_seqlens_q is not None and a.cu_seqlens_k is not None:  # as of the padded batch
            lengths = (a.cu_seqlens_q.diff(), a.cu_seqlens_k.diff())
            longest, most = (int(x.max()) if x.numel() else 0 for x in lengths)
            shape = (lengths[0].numel(), H, longest, most + a.columns - a.key.shape[1])
        dropout_mask = schema.dropout_mask(a.seed, shape, a.dropout_p)
    window, diagonal = None, a.key.shape[1] - L if a.bottom_right and a.cu_seqlens_q is None else 0
    if a.first_visible is not None or a.last_visible is not None:
        window = (
            None if a.first_visible is None else diagonal - a.first_visible,
            None if a.last_visible is None else a.last_visible - diagonal,
        )
    device = a.query.device.type
    with torch.autocast(device, enabled=False) if autocast_is_on(device) else contextlib.nullcontext():
        output, weights, lse = reference.attention(
            a.query,
            key,
            value,
            a.attn_mask,
            a.key_padding_mask,
            causal_alignment="bottom_right" if a.bottom_right else "top_left",
            window=window,
            bias_k=a.bias_k,
            bias_v=a.bias_v,
            sinks=a.sinks,
            alibi_slopes=a.alibi_slopes,
            add_zero_attn=a.add_zero_attn,
            dropout_p=schema.drawn_probability(a.dropout_p),
            scale=a.scale,
            softcap=a.softcap,
            need_weights=a.need_weights,
            average_attn_weights=a.average_attn_weights,
            return_lse=True,
            weights_of_heads=a.weights_of_heads or None,
            cu_seqlens_q=a.cu_seqlens_q,
            cu_seqlens_k=a.cu_seqlens_k,
            dropout_mask=dropout_mask,
        )
    assert lse is not None
    return output, weights, lse


@torch.library.impl(schema.LIBRARY, "attention", "CompositeExplicitAutograd")
def attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of that name."""
    arguments = Arguments(*inputs)
    output, weights, lse = reference_attention(arguments)
    weights = lse.new_empty(arguments.weights_shape, dtype=output.dtype) if weights is None else weights
    stats = torch.stack((lse, torch.ones_like(lse)))
    return output.contiguous(), weights.contiguous(), lse, stats


@torch.library.impl(schema.LIBRARY, "dropout_mask", "CompositeExplicitAutograd")
def _dropout_mask(seed: Tensor, shape: list[int], dropout_p: float) -> Tensor:
    """Philox4x32-7 as `csrc/generic/philox.h` has it, in int64."""
    N, H, L, S = shape
    key, offset, *place = seed.unbind()
    first_query, first_key, first_head, heads = place or (0, 0, 0, H)
    head = torch.arange(N, device=seed.device).unsqueeze(1) * heads + torch.arange(H, device=seed.device)
    counter = [
        (torch.arange((S + 7) // 8, device=seed.device) + first_key // 8).view(1, 1, -1),
        (torch.arange(L, device=seed.device) + first_query).view(1, -1, 1),
        (head + first_head).view(-1, 1, 1),
        (offset & _WORD).view(1, 1, 1),
    ]
    keys = [key & _WORD, key >> 32 & _WORD]
    for _ in range(7):
        high_0, low_0 = _multiply(0xD2511F53, counter[0])
        high_1, low_1 = _multiply(0xCD9E8D57, counter[2])
        counter = [high_1 ^ counter[1] ^ keys[0], low_1, high_0 ^ counter[3] ^ keys[1], low_0]
        keys = [keys[0] + 0x9E3779B9 & _WORD, keys[1] + 0xBB67AE85 & _WORD]
    halves = [half for word in torch.broadcast_tensors(*counter) for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).flatten(2)[..., :S]  # [N * H, L, S], 16 of them for each key
    return (bits >= int(schema.drawn_probability(dropout_p) * 65536)).unflatten(0, (N, H))


_WORD = 0xFFFFFFFF


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of words; int64 has no room for it at once."""
    low = factor * (x & 0xFFFF)
    middle = factor * (x >> 16) + (low >> 16)
    return middle >> 16, (middle << 16 | low & 0xFFFF) & _WORD

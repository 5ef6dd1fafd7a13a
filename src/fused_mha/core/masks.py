"""What each mask means, in one place, on plain tensors.

`reference` and the sdpa back end turn all masks of a call into one additive bias here; `dispatch` keeps the keys that
are hidden from every query out of the arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_mha.core.inputs import CausalAlignment, Window


NEGATIVE_INFINITY = float("-inf")
_FAR = 1 << 60  # from a query to a key, which none is; sums with lengths stay below 2^63


def hidden_keys(key_padding_mask: Tensor) -> Tensor:
    """The keys that a mask hides from every query: True of a bool mask, -inf of a float one.

    Autograd may keep the result, and the caller fill the mask anew.
    """
    if key_padding_mask.dtype != torch.bool:
        return key_padding_mask == NEGATIVE_INFINITY
    return key_padding_mask.clone() if torch.is_grad_enabled() else key_padding_mask


def per_head(attn_mask: Tensor, N: int, num_heads: int) -> Tensor:
    """A module's attn_mask, (L, S), (N * H, L, S) or 4-D, as (N|1, H|1, L|1, S)."""
    if attn_mask.dim() == 2:
        return attn_mask.view(1, 1, *attn_mask.shape)
    return attn_mask.view(N, num_heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask


def without_hidden_keys(key: Tensor, value: Tensor, key_padding_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (N, S, H_kv, D) with zeros where the mask hides them: 0 * NaN = NaN would reach the output."""
    hidden = hidden_keys(key_padding_mask)[:, :, None, None]
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def finite_where(hidden: Tensor, x: Tensor) -> Tensor:
    """``x`` with zeros for NaN and infinity where a mask hides it: what is a query too has an output that counts."""
    return torch.where(hidden, x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), x)


def limits(window: Window | None) -> Window:
    """The sides of a window, as 64 bits hold them."""
    left, right = (None if side is None else min(side, _FAR) for side in window or (None, None))
    return left, right


def outside_band(
    L: int, S: int, is_causal: bool, alignment: CausalAlignment, window: Window | None, device: torch.device
) -> Tensor | None:
    """The (L, S) bool mask (True = ignore) of causality and a sliding window, or None if neither hides anything.

    Query i stands at key position p = i (top_left) or p = i + S - L (bottom_right). A causal query sees the keys
    j <= p; a window (left, right) those with p - left <= j <= p + right. Visible keys for L = 2, S = 4, causal::

        top_left     1 0 0 0      bottom_right     1 1 1 0
                     1 1 0 0                       1 1 1 1
    """
    left, right = limits(window)
    if is_causal:
        right = 0
    if left is None and right is None:
        return None
    diagonal = S - L if alignment == "bottom_right" else 0  # j - i of a query's own position
    everywhere = torch.ones(L, S, dtype=torch.bool, device=device)
    too_late = everywhere.triu(diagonal + right + 1) if right is not None else None
    too_early = everywhere.tril(diagonal - left - 1) if left is not None else None
    if too_late is None or too_early is None:
        return too_early if too_late is None else too_late
    return too_late | too_early


def alibi_bias(slopes: Tensor, L: int, S: int, alignment: CausalAlignment, virtual_keys: int) -> Tensor:
    """Of slopes (H), -slope * |p - j| for the position p of query i, as in `outside_band`; (1, H, L, S + virtual_keys).

    Virtual keys are near to every query. Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3.
    """
    diagonal = S - L if alignment == "bottom_right" else 0
    positions = torch.arange(L, device=slopes.device).unsqueeze(1) + diagonal
    distances = (positions - torch.arange(S, device=slopes.device)).abs().to(slopes.dtype)
    return torch.nn.functional.pad(slopes.view(1, -1, 1, 1) * -distances, (0, virtual_keys))


def attention_bias(
    L: int,
    S: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    alignment: CausalAlignment,
    window: Window | None,
    virtual_keys: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """All masks of a call as one tensor to add to the scores, (N|1, H|1, L|1, S + virtual_keys), or None.

    Virtual keys come after the S real ones and are visible to every query.
    """
    hidden = bias = None
    band = outside_band(L, S, is_causal, alignment, window, device)
    padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(1).unsqueeze(1)
    for mask in (attn_mask, padding, band):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            hidden = mask if hidden is None else hidden | mask
        else:
            bias = mask.to(dtype) if bias is None else bias + mask.to(dtype)
    if hidden is not None:
        unmasked = torch.zeros_like(hidden, dtype=dtype) if bias is None else bias
        bias = unmasked.masked_fill(hidden, NEGATIVE_INFINITY)
    if bias is None:
        return None
    if bias.dim() == 2:
        bias = bias[None, None]
    return torch.nn.functional.pad(bias, (0, virtual_keys)) if virtual_keys else bias


def without_empty_rows(bias: Tensor) -> tuple[Tensor, Tensor]:
    """The bias with zeros in the rows that are -inf alone, and these rows, bool (N|1, H|1, L|1, 1).

    The softmax of such a row is NaN, and so is its gradient: it is scored as if it were not masked, and the caller
    puts zeros in the place of what it gives.
    """
    empty = (bias == NEGATIVE_INFINITY).all(dim=-1, keepdim=True)
    return bias.masked_fill(empty, 0.0), empty

"""What each mask means, in one place, on plain tensors.

`reference` and the sdpa back end turn all masks of a call into one additive bias here; `functional` and the module keep
hidden keys out of the arithmetic with `zero_hidden_keys`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_mha.inputs import CausalAlignment, Window


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores: a bool mask becomes 0, or -inf where it is True (= ignore)."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def zero_hidden_keys(keys: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Keys or values with zeros where `key_padding_mask` hides them: 0 * NaN = NaN would reach outputs and gradients.

    Args:
        keys: (N, S, ...), any floating dtype.
        key_padding_mask: (N, S), bool (True = ignore) or float (-inf = ignore), or None.

    Returns:
        Like ``keys``; ``keys`` itself if there is no mask.
    """
    if key_padding_mask is None:
        return keys
    hidden = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == float("-inf")
    return keys.masked_fill(hidden[(...,) + (None,) * (keys.dim() - 2)], 0.0)


def outside_band(
    L: int, S: int, is_causal: bool, alignment: CausalAlignment, window: Window | None, device: torch.device
) -> Tensor | None:
    """The (L, S) bool mask (True = ignore) of causality and a sliding window, or None if neither hides anything.

    Query i stands at key position p = i (top_left) or p = i + S - L (bottom_right). A causal query sees the keys
    j <= p; a window (left, right) those with p - left <= j <= p + right. Visible keys for L = 2, S = 4, causal::

        top_left     1 0 0 0      bottom_right     1 1 1 0
                     1 1 0 0                       1 1 1 1
    """
    left, right = window if window is not None else (None, None)
    if is_causal:
        right = 0
    if left is None and right is None:
        return None
    position = torch.arange(L, device=device)[:, None] + (S - L if alignment == "bottom_right" else 0)
    distance = torch.arange(S, device=device)[None, :] - position  # [L, S], > 0 in the future
    too_late = distance > right if right is not None else None
    too_early = distance < -left if left is not None else None
    if too_late is None or too_early is None:
        return too_early if too_late is None else too_late
    return too_late | too_early


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
    bias = None
    for mask in (
        attn_mask,
        None if key_padding_mask is None else key_padding_mask[:, None, None, :],
        outside_band(L, S, is_causal, alignment, window, device),
    ):
        if mask is not None:
            term = additive(mask, dtype)
            bias = term if bias is None else bias + term
    if bias is None:
        return None
    if bias.dim() == 2:
        bias = bias[None, None]
    return torch.nn.functional.pad(bias, (0, virtual_keys)) if virtual_keys else bias

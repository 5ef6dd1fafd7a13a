"""The mask function that `integrations.transformers` registers: bands, padding and caches without a dense mask.

transformers describes a mask by a function of positions, put together of its own few and of what a model or a user
adds. A function whose parts are all known is a band; any other is made dense by transformers itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from fused_mha.core.inputs import Window
from fused_mha.core.masks import outside_band
from fused_mha.integrations.band_mask import BandMask

MaskFunction = Callable[..., Tensor]


def masking_utils() -> Any:
    """transformers' module of mask functions, or None before 4.53, whose models make dense masks."""
    try:
        from transformers import masking_utils  # noqa: PLC0415
    except ImportError:
        return None
    return masking_utils


def attention_mask(
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **sizes: Any,
) -> Tensor | None:
    """A mask function of transformers: a `BandMask` where a band, padding and the future are all that is hidden.

    Every other mask is the dense one of transformers' own `sdpa_mask`, and so are those of compiled models: Dynamo
    makes no tensors of a subclass.

    Args:
        mask_function: of batch, head, query and key position: whether the query attends.
        attention_mask: (N, kv_offset + S), which keys are no padding; a shorter one hides the keys behind it.
        allow_is_causal_skip: None may be returned for causal masks; False too for a step that is to be compiled.
        allow_is_bidirectional_skip: None may be returned for other masks.
        **sizes: those of `_band_mask`, and what `sdpa_mask` takes besides.

    Returns:
        (N, 1, L, S), bool, True = attend, or None where nothing is hidden.
    """
    may_be_none = allow_is_causal_skip or allow_is_bidirectional_skip
    masking = masking_utils()
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        mask = _band_mask(mask_function, attention_mask, **sizes)
        # What may not be None, and is of one query, goes into a compiled step: the number of keys would be a constant.
        if mask is not None and (may_be_none or mask.shape[2] > 1):
            return None if may_be_none and mask.shape[2] == 1 and mask.hides_nothing else mask
    elif allow_is_bidirectional_skip and attention_mask is None:
        if mask_function is masking.bidirectional_mask_function:
            return None
    return masking.sdpa_mask(
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **sizes,
    )


def _band_mask(
    mask_function: MaskFunction,
    attention_mask: Tensor | None,
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> BandMask | None:
    """The mask as a band of the visible keys, or None where it is none.

    Args:
        mask_function: as in `attention_mask`.
        attention_mask: as in `attention_mask`.
        batch_size: N.
        kv_length: S.
        kv_offset: the position of the first key.
        q_length: L, from transformers 5.2 on.
        q_offset: the position of the first query; a tensor () where a static cache counts.
        cache_position: (L,), the positions of the queries, before that.
        device: of the mask; before that, cache_position's.
        **_: what `sdpa_mask` takes besides.

    Returns:
        (N, 1, L, S).
    """
    band = _band_of(mask_function)
    if band is None:
        return None
    if cache_position is not None:
        if cache_position.numel() > 1 and not bool((cache_position.diff() == 1).all()):
            return None
        q_length, q_offset, device = cache_position.numel(), cache_position[0], cache_position.device
    if q_length is None or device is None or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    visible = kv_length if band == (None, None) else int(q_offset) - kv_offset + q_length
    if not (visible == kv_length or (band[1] == 0 and 1 <= visible <= kv_length)):
        return None
    padding = None
    if attention_mask is not None:
        seen = attention_mask[:, kv_offset : kv_offset + visible]
        if seen.shape[1] < visible or not bool(seen.all()):
            padding = torch.nn.functional.pad(seen.logical_not(), (0, visible - seen.shape[1]), value=True)
            padding = padding.expand(batch_size, visible)
    return BandMask((batch_size, 1, q_length, kv_length), band, visible, padding, torch.device(device))


def _band_of(mask_function: MaskFunction) -> Window | None:
    """The band (left, right) that a mask function is, or None where it is none or is not known."""
    code = getattr(mask_function, "__code__", None)
    known = _known_functions().get(code)
    if known is None:
        return None
    cells = zip(code.co_freevars, mask_function.__closure__ or (), strict=True)  # pyright: ignore
    return known({name: cell.cell_contents for name, cell in cells})


@functools.cache
def _known_functions() -> dict[CodeType | None, Callable[[dict[str, Any]], Window | None]]:
    """By the code of transformers' functions, what band one is, given the variables of its closure.

    Only of those that this version's do not contradict: each is tried on a few positions.
    """
    masking = masking_utils()
    known: dict[CodeType | None, Callable[[dict[str, Any]], Window | None]] = {}

    def add(function: MaskFunction, band_of: Callable[[dict[str, Any]], Window | None], band: Window) -> None:
        positions = torch.arange(8)
        zero = torch.zeros((), dtype=torch.long)
        attends = function(zero, zero, positions[:, None], positions).expand(8, 8)
        hidden = outside_band(8, 8, False, "top_left", band, zero.device)
        if torch.equal(attends, torch.ones(8, 8, dtype=torch.bool) if hidden is None else ~hidden):
            known[function.__code__] = band_of  # pyright: ignore[reportFunctionMemberAccess]

    causal = masking.causal_mask_function
    add(causal, lambda _: (None, 0), (None, 0))
    add(masking.sliding_window_overlay(3), lambda of: _window(of, lambda w: (w - 1, None)), (2, None))
    add(masking.and_masks(causal), _intersection, (None, 0))
    if hasattr(masking, "bidirectional_mask_function"):  # from 5.0 on
        add(masking.bidirectional_mask_function, lambda _: (None, None), (None, None))
    if hasattr(masking, "sliding_window_bidirectional_overlay"):
        overlay = masking.sliding_window_bidirectional_overlay(3)
        add(overlay, lambda of: _window(of, lambda w: (w, w)), (3, 3))
    return known


def _window(variables: dict[str, Any], band: Callable[[int], Window]) -> Window | None:
    size = variables.get("sliding_window")
    return band(size) if isinstance(size, int) and size > 0 else None


def _intersection(variables: dict[str, Any]) -> Window | None:
    """The band of `and_masks`, if each of its functions is one."""
    bands = [_band_of(function) for function in variables.get("mask_functions", (None,))]
    if None in bands:
        return None
    left, right = (
        min((limit for limit in limits if limit is not None), default=None)
        for limits in zip(*(band for band in bands if band is not None), strict=True)
    )
    return left, right

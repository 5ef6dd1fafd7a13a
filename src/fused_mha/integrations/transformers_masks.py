"""The mask function that `integrations.transformers` registers: bands, padding and caches without a dense mask.

transformers describes a mask by a function of positions, put together of its own few and of what a model or a user
adds. A function whose parts are all known is a band; any other is made dense by transformers itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from fused_mha.core.inputs import Window
from fused_mha.core.masks import outside_band
from fused_mha.integrations.lazy_mask import Band, LazyMask

MaskFunction = Callable[..., Tensor]


def masking_utils() -> Any:
    """The mask functions of transformers, or None before 4.53, whose models make dense masks."""
    return sys.modules.get("transformers.masking_utils")  # loaded with its models; Dynamo traces no import


def attention_mask(
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Tensor | None:
    """A mask function of transformers: a `LazyMask`, of a band where that and padding are all that is hidden.

    Any other mask is what transformers' own `sdpa_mask` makes of the function. A compiled model gets the mask of
    `eager`: Dynamo makes no tensors of a subclass.

    Args:
        mask_function: of batch, head, query and key position: whether the query attends.
        attention_mask: (N, kv_offset + S), which keys are no padding; a shorter one hides the keys behind it.
        allow_is_causal_skip: None may be returned for causal masks; False too for a step that is to be compiled.
        allow_is_bidirectional_skip: None may be returned for other masks.
        dtype: of the mask.
        **sizes: those of `_band`, and what `sdpa_mask` takes besides.

    Returns:
        (N, 1, L, S), 0 or the lowest number, or None where nothing is hidden.
    """
    masking = masking_utils()
    of_function = {"mask_function": mask_function, "attention_mask": attention_mask, **sizes}
    may_be_none = allow_is_causal_skip or allow_is_bidirectional_skip
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        may_hide = mask_function is not getattr(masking, "bidirectional_mask_function", None)
        if allow_is_bidirectional_skip and attention_mask is None and not may_hide:
            return None
        return masking.eager_mask(dtype=dtype, **of_function)
    cache_position = sizes.get("cache_position")  # before transformers 5.4
    N, S = sizes["batch_size"], sizes["kv_length"]
    L = sizes["q_length"] if cache_position is None else cache_position.numel()
    if L == 1 and not may_be_none:  # it goes into a compiled step, where the number of keys would be a constant
        return masking.eager_mask(dtype=dtype, **of_function)
    device = torch.device(sizes["device"]) if cache_position is None else cache_position.device
    band = _band(mask_function, attention_mask, L, **sizes)
    if band is None:
        attends = masking.sdpa_mask(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **of_function)
        return LazyMask((N, 1, L, S), attends.logical_not(), dtype, device)
    if L == 1 and may_be_none and band == Band((None, None), S, None):
        return None
    return LazyMask((N, 1, L, S), band, dtype, device)


def _band(
    mask_function: MaskFunction,
    attention_mask: Tensor | None,
    L: int,
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    **_: Any,
) -> Band | None:
    """The mask as a band, or None where it is none.

    Args:
        mask_function: as in `attention_mask`.
        attention_mask: as in `attention_mask`.
        L: how many queries.
        batch_size: N.
        kv_length: S.
        kv_offset: the position of the first key.
        q_offset: the position of the first query; a tensor () where a static cache counts.
        cache_position: (L,), the positions of the queries, before transformers 5.4.

    Returns:
        It, without limits that hide nothing.
    """
    limits = _limits_of(mask_function)
    if limits is None or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    if cache_position is not None:
        if L > 1 and not bool((cache_position.diff() == 1).all()):
            return None
        q_offset = cache_position[0]
    visible = kv_length if limits == (None, None) else int(q_offset) - kv_offset + L
    if not (visible == kv_length or (limits[1] == 0 and 1 <= visible <= kv_length)):
        return None
    padding = None
    if attention_mask is not None:
        attends = attention_mask[:, kv_offset : kv_offset + visible]
        missing = visible - attends.shape[1]
        if missing or not bool(attends.all()):
            padding = torch.nn.functional.pad(attends.logical_not(), (0, missing), value=True)
            padding = padding.expand(batch_size, visible)
    return Band(limits, visible, padding).effective(L)


def _limits_of(mask_function: MaskFunction) -> Window | None:
    """The limits (left, right) of the band that a mask function is, or None where it is none or is not known."""
    if not isinstance(mask_function, FunctionType):
        return None
    code = mask_function.__code__
    known = _known_functions().get(code)
    if known is None:
        return None
    cells = zip(code.co_freevars, mask_function.__closure__ or (), strict=True)
    return known({name: cell.cell_contents for name, cell in cells})


@functools.cache
def _known_functions() -> dict[CodeType, Callable[[dict[str, Any]], Window | None]]:
    """By the code of transformers' functions, what band one is, given the variables of its closure.

    Only of those that this version's do not contradict: each is tried on a few positions.
    """
    masking = masking_utils()
    known: dict[CodeType, Callable[[dict[str, Any]], Window | None]] = {}

    def add(function: FunctionType, band_of: Callable[[dict[str, Any]], Window | None], band: Window) -> None:
        positions = torch.arange(8)
        zero = torch.zeros((), dtype=torch.long)
        attends = function(zero, zero, positions[:, None], positions).expand(8, 8)
        hidden = outside_band(8, 8, False, "top_left", band, zero.device)
        if torch.equal(attends, torch.ones(8, 8, dtype=torch.bool) if hidden is None else ~hidden):
            known[function.__code__] = band_of

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
    bands = [_limits_of(function) for function in variables.get("mask_functions", (None,))]
    if None in bands:
        return None
    left, right = (
        min((limit for limit in limits if limit is not None), default=None)
        for limits in zip(*(band for band in bands if band is not None), strict=True)
    )
    return left, right

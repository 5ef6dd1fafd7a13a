"""Layers of transformers' `DynamicCache` that write new tokens behind the old ones, in memory that grows by doubling.

`integrations.transformers.cache` puts them into a cache, and imports this file for it, which needs transformers.
transformers' own layers copy all tokens at each new one. All else that a layer does, as cropping and reordering, stays
transformers' own: `keys` and `values` are views of our memory, or other tensors that are copied there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (  # pyright: ignore[reportMissingImports]
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from fused_mha.module.cache import LEAST_CAPACITY, writable


class _Growing:
    """What our layers do in the place of concatenation, before a class of transformers."""

    keys: Tensor
    values: Tensor
    _memory: tuple[Tensor, Tensor] | None = None  # (N, H_kv, capacity, D)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add (N, H_kv, L, D) to what is kept, and return what the call attends to."""
        of_transformers: Any = super()
        # Autograd saves what later calls would write to, and Dynamo knows no addresses.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not of_transformers.get_seq_length():
            return of_transformers.update(key_states, value_states, *args, **kwargs)
        if not (_continues(self.keys, key_states) and _continues(self.values, value_states)):
            return of_transformers.update(key_states, value_states, *args, **kwargs)
        of_keys, of_values = self._memory or (None, None)
        of_keys, keys = _appended(of_keys, self.keys, key_states)
        of_values, values = _appended(of_values, self.values, value_states)
        self._memory = of_keys, of_values
        return self._kept(keys, values, key_states.shape[2])

    def _kept(self, keys: Tensor, values: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Keep what later calls attend to, and return what this one does."""
        self.keys, self.values = keys, values
        return keys, values


class GrowingLayer(_Growing, DynamicLayer):
    """The layer of full attention."""


class GrowingSlidingWindowLayer(_Growing, DynamicSlidingWindowLayer):
    """The layer of a window."""

    def _kept(self, keys: Tensor, values: Tensor, new: int) -> tuple[Tensor, Tensor]:
        self.cumulative_length += new
        before = self.sliding_window - 1
        if getattr(self, "record_past", False):  # for a crop, which leaves the window alone
            self.keys, self.values = keys, values
            return keys[:, :, -before - new :], values[:, :, -before - new :]
        self.keys, self.values = keys[:, :, -before:], values[:, :, -before:]
        return keys, values


_OURS: dict[type, type] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingWindowLayer}


def growing_cache(config: Any) -> Any:
    """What `integrations.transformers.cache` returns."""
    of_decoder = config.get_text_config(decoder=True)
    cache: Any = DynamicCache(config=of_decoder)
    cache.layers = [_growing(layer) for layer in cache.layers]
    return EncoderDecoderCache(cache, DynamicCache(config=of_decoder)) if config.is_encoder_decoder else cache


def _growing(layer: Any) -> Any:
    """The same as one of our layers; those of other kinds, as of linear attention, stay."""
    if type(layer) not in _OURS:
        return layer
    ours = object.__new__(_OURS[type(layer)])
    vars(ours).update(vars(layer))
    return ours


def _continues(kept: Tensor, new: Tensor) -> bool:
    """Whether they differ in their number of tokens alone."""
    sizes, others = (x.shape[:2] + x.shape[3:] for x in (kept, new))
    return sizes == others and kept.dtype == new.dtype and kept.device == new.device


def _appended(memory: Tensor | None, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The memory, or one in its place, and in it both side by side.

    Args:
        memory: (N, H_kv, capacity, D), or None.
        kept: (N, H_kv, S, D), a part of the memory or any other tensor.
        new: (N, H_kv, L, D).

    Returns:
        The memory and (N, H_kv, S + L, D).
    """
    N, H_kv, S, D = kept.shape
    end = S + new.shape[2]
    first = None if memory is None else _first_slot(memory, kept)
    if memory is None or first is None or first + end > memory.shape[2]:
        with writable():
            memory = kept.new_empty(N, H_kv, max(end, 2 * S, LEAST_CAPACITY), D)
            memory[:, :, :S] = kept
        first = 0
    both = memory[:, :, first : first + end]
    both[:, :, S:] = new
    return memory, both


def _first_slot(memory: Tensor, kept: Tensor) -> int | None:
    """Where in the memory ``kept`` begins; None if it lies elsewhere."""
    if kept.shape[:2] != memory.shape[:2] or kept.stride() != memory.stride() or kept.dtype != memory.dtype:
        return None
    first, rest = divmod(kept.data_ptr() - memory.data_ptr(), memory.stride(2) * memory.element_size())
    return first if rest == 0 and 0 <= first <= memory.shape[2] - kept.shape[2] else None

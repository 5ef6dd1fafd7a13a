"""Tensors as the kernels read them: 16 bytes at once, from addresses and by strides that are multiples of that.

`launch` calls these. What is no such tensor is copied, with zeros behind rows that are too short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_mha.backends.triton.tiles import PADDING_UNIT
from fused_mha.core.memory import aligned, unit_of
from fused_mha.ops.schema import TENSORS, Arguments


def arguments(a: Arguments) -> Arguments:
    """The same call, of tensors as `Call` has them; odd head sizes are filled up by zeros."""
    unit = unit_of(a.query)
    query, key, value = (rows(x, unit) for x in a[:3])
    mask, padding = (None if x is None else _last_contiguous(_unexpanded(x)) for x in a[3:5])
    padding = None if padding is None else rows(padding, PADDING_UNIT.value)
    biases = (None if x is None else rows(x.contiguous(), unit) for x in a[5:7])
    seed = None if a.seed is None else rows(a.seed.contiguous(), 1)
    of_heads = (None if x is None else rows(x if x.element_size() in (2, 4) else x.float(), 1) for x in a[8:10])
    offsets = (None if x is None else rows(x, 1) for x in a[10:TENSORS])
    return Arguments.of((query, key, value, mask, padding, *biases, seed, *of_heads, *offsets), a[TENSORS:])


def rows(x: Tensor, unit: int) -> Tensor:
    """The tensor at a multiple of 16 bytes, with rows and strides that ``unit`` divides; else a copy, with zeros."""
    size = x.shape[-1]
    if size % unit:
        return torch.constant_pad_nd(x, (0, -size % unit)).contiguous()
    return aligned(x, unit)


def first(x: Tensor, size: int) -> Tensor:
    """So many elements of each row, without what `rows` filled up."""
    return x if x.shape[-1] == size else x[..., :size].contiguous()


def unit_of_mask(mask: Tensor) -> int:
    """Of its elements, 16 bytes if its address and its strides are multiples of that, else 1."""
    unit = unit_of(mask)
    return unit if mask.data_ptr() % 16 == 0 and not any(stride % unit for stride in strides(mask)) else 1


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of the first dimensions; 0 where there is only one to reach."""
    n, i, j = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return n, i, j


def _unexpanded(x: Tensor) -> Tensor:
    """Size 1 in the dimensions but the last along which nothing changes."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride()[:-1])] if 0 in x.stride() else x


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

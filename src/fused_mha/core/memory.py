"""What kernels go by of a tensor beside its values: sizes, strides, dtype, device, alignment, and that it is plain.

`plans` and the back end for CUDA keep by it what serves a call; the others ask whether a tensor is plain.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

Found = TypeVar("Found")

# Types whose operators no class of their own sees.
PLAIN_TYPES = (Tensor, Parameter)
PLAIN_OR_NONE = frozenset((*PLAIN_TYPES, type(None)))


def has_plain_memory(x: Tensor) -> bool:
    """Whether ``x`` is on the CPU or a GPU, and its memory holds its values: it is no sparse, fake, batched or negated
    tensor, nor one that a class of its own dispatches.
    """
    device = x.device.type
    return device in ("cpu", "cuda") and torch._C._dispatch_keys(x).raw_repr() in plain_keys(device)


def memory_of(x: Tensor) -> tuple[object, ...]:
    """All of a plain tensor but its values: sizes, strides, dtype, device, and how its address is aligned."""
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15


def memory_of_each(tensors: Iterable[Tensor | None], device_type: str) -> list[tuple[object, ...] | None] | None:
    """`memory_of` all of them; None if one is no plain tensor or parameter of such a device."""
    keys = plain_keys(device_type)
    found: list[tuple[object, ...] | None] = []
    for x in tensors:
        if x is None:
            found.append(None)
        elif type(x) not in PLAIN_TYPES or _keys_of(x).raw_repr() not in keys:
            return None
        else:
            found.append(memory_of(x))
    return found


_keys_of = torch._C._dispatch_keys


@functools.cache
def plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of tensors of a device that are nothing but memory."""
    with torch.inference_mode(False):  # the first call may be inside that mode
        plain = torch.empty(0, device=device_type)
    with torch.inference_mode():
        of_inference = torch.empty(0, device=device_type)
    return frozenset(torch._C._dispatch_keys(x).raw_repr() for x in (plain, of_inference))


def aligned(x: Tensor, unit: int) -> Tensor:
    """``x``, at a multiple of 16 bytes and with contiguous rows; unless ``unit`` divides all other strides, or it is
    contiguous, a copy.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    strides = (stride % unit for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    if x.stride(-1) == 1 and not any(strides) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def unit_of(x: Tensor) -> int:
    """How many elements 16 bytes have, which the memory of a GPU gives at once."""
    return 16 // x.element_size()


class Recent(Generic[Found]):
    """What was found for the last few kinds of plain tensors.

    Those of one kind are the same to kernels, need gradients alike, and are met in the same modes. All of that is
    compared in one call, a tenth of the time that `memory_of_each` takes.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Any, list[int], Found]] = []

    def find(self, tensors: Sequence[Tensor]) -> Found | None:
        """What was noted for such tensors, of which none comes twice; None where that is not known."""
        for guards, addresses, found in self._known:
            if guards.check(*tensors) and [x.data_ptr() & 15 for x in tensors] == addresses:
                return found
        return None

    def note(self, tensors: Sequence[Tensor], found: Found) -> None:
        """Know this from now on, except where torch has no `TensorGuards`, which are not public."""
        if _TensorGuards is None:
            return
        sizes, strides = [[*x.shape] for x in tensors], [[*x.stride()] for x in tensors]
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._known.insert(0, (guards, [x.data_ptr() & 15 for x in tensors], found))
        del self._known[_MOST_RECENT:]


_MOST_RECENT = 4
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_TensorGuards: Any = getattr(_guards, "TensorGuards", None)

"""Run by `test_memory` in a process of its own: calls whose every tensor lies between pages that may not be touched.

    guarded_calls.py ISA      draws calls; prints each before it runs, so that the last line is the culprit
    guarded_calls.py overrun  reads one byte too far, to show that this kills the process

A tensor ends where its last page ends, or begins where its first page begins; the rest of its pages is filled with a
pattern that is looked at afterwards. Inputs are read-only. Results are filled with ones bits: NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import sys
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings

from attention_oracle import run_with_gradients
from fused_mha.backends.cpu import LIBRARY
from native.c_abi import ISAS_OF
from native.call_space import calls
from native.dense_oracle import drawn_seed, native_attention

PAGE = mmap.PAGESIZE
PATTERN, POISON = 0xA5, 0xFF
PROT_NONE, PROT_READ, PROT_READ_WRITE = 0, 1, 3


def protect(address: int, size: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(protection)) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


class Guard:
    """Hands out tensors between untouchable pages, at the end of theirs or, every second, at the beginning."""

    def __init__(self) -> None:
        self.handed_out: list[tuple[torch.Tensor, int, int]] = []

    def storage(self, size: int, at_end: bool) -> torch.Tensor:
        """`size` bytes."""
        if size == 0:
            return torch.tensor([], dtype=torch.uint8)
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        whole[PAGE:-PAGE] = PATTERN
        begin = (pages + 1) * PAGE - size if at_end else PAGE
        for first in (0, (pages + 1) * PAGE):
            protect(whole.data_ptr() + first, PAGE, PROT_NONE)
        self.handed_out.append((whole, begin, begin + size))
        part = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin)
        part.fill_(POISON)
        return part

    def empty(self, shape, dtype) -> torch.Tensor:
        """A result of torch.empty."""
        count = torch.Size(shape).numel()
        at_end = len(self.handed_out) % 3 != 0
        return self.storage(count * dtype.itemsize, at_end).view(dtype).view(tuple(shape))

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """The same numbers and strides, read-only."""
        extent = 0
        if x.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        storage = self.storage(extent * x.element_size(), True).view(x.dtype)
        flat = torch.as_strided(x, (extent,), (1,), x.storage_offset())
        if not extent:
            return torch.as_strided(storage, x.shape, x.stride())
        storage.copy_(flat)
        whole = self.handed_out[-1][0]
        protect(whole.data_ptr() + PAGE, whole.numel() - 2 * PAGE, PROT_READ)
        return torch.as_strided(storage, x.shape, x.stride())

    def check(self) -> None:
        """Nothing outside the tensors was written."""
        for whole, begin, end in self.handed_out:
            assert bool((whole[PAGE:begin] == PATTERN).all()), "bytes before a tensor were written"
            assert bool((whole[end:-PAGE] == PATTERN).all()), "bytes after a tensor were written"


@contextlib.contextmanager
def guarding(guard: Guard):
    """Every tensor that Python code allocates meanwhile lies between guards."""

    def empty(*shape, dtype=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guard.empty((shape,) if isinstance(shape, int) else shape, dtype or torch.get_default_dtype())

    def new_empty(x, *shape, dtype=None, **_):
        return empty(*shape, dtype=dtype or x.dtype)

    def new_zeros(x, *shape, dtype=None, **_):
        return empty(*shape, dtype=dtype or x.dtype).zero_()

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "zeros_like", lambda x: new_zeros(x, x.shape)),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch.Tensor, "new_zeros", new_zeros),
    ):
        yield


def run_guarded(isa: str) -> None:
    """Hold guarded calls against the same ones in plain memory, of the types that the instruction set has code for."""
    LIBRARY.set_isa(isa)
    dtypes = tuple(dtype for dtype, names in ISAS_OF.items() if isa in names)

    # No shrinking: a failure keeps its pages alive, and the system has no more than some thousand to give.
    @settings(
        max_examples=15 * len(dtypes),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(call=calls(dtypes=dtypes, dropout=(0.0, 0.0, 0.4)))
    def check(call) -> None:
        described = {
            k: (tuple(v.shape), v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v
            for k, v in call.arguments.items()
        }
        print(described, flush=True)
        guard = Guard()
        inputs = {k: guard.copy(v) if isinstance(v, torch.Tensor) else v for k, v in call.arguments.items()}
        with drawn_seed(*call.seed):
            expected = run_with_gradients(native_attention, call.arguments)
            with guarding(guard):
                results = run_with_gradients(native_attention, inputs)
        guard.check()
        for name, x in expected.items():
            assert torch.equal(results[name], x), name

    check()


if __name__ == "__main__":
    faulthandler.enable()
    if sys.argv[1] == "overrun":
        ctypes.string_at(Guard().storage(64, at_end=True).data_ptr() + 1, 64)
    else:
        run_guarded(sys.argv[1])
        print("all calls kept to their memory")

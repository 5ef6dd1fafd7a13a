"""One kernel of a call, launched again and again with other tensors of the same sizes; `launch` makes these.

Triton's own way to a kernel takes 15 microseconds, in which it looks at every argument. It is taken once; then
`torch._C._StaticCudaLauncher`, which Inductor's programs use, is given addresses, in less than one. That name is not
public: where it is missing, Triton's way is taken each time.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from fused_mha.backends.triton.entry import entry
from fused_mha.backends.triton.tile_config import Launch
from fused_mha.backends.triton.tiles import TENSORS, Call

Tensors = tuple[Any, ...]  # Tensor or None
_runtime = knobs.runtime
_static: Any = getattr(torch._C, "_StaticCudaLauncher", None) if torch.version.hip is None else None
static_launch: Any = getattr(_static, "_launch_kernel", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # CUDA has been started
_SCRATCH = ("global_scratch_size", "profile_scratch_size")  # more pointers of a kernel that has them, to nothing here
_UNUSED = (*_SCRATCH, "launch_cooperative_grid", "launch_pdl")


class Launcher:
    """A kernel with what does not change: the number of programs, the numbers of the `Call`, and the tile."""

    def __init__(self, kernel: Any, programs: int, how: Launch, call: Call, tile: Any, record: Any = None) -> None:
        """With a ``record``, the kernel takes the first operands as one, the fields of such a named tuple."""
        self.kernel, self.programs, self.how, self.tile = kernel, programs, how, tile
        self.numbers = tuple(call[TENSORS:])
        self._record = record
        # Of what Triton has compiled: the code, which is to stay loaded; what `static_launch` is given before the
        # addresses, and behind them; and what gives the tensors that have one.
        self._compiled: Any = None
        self._fixed: tuple[Any, ...] = ()
        self._numbers: tuple[int | float | None, ...] = ()
        self._present: Any = None

    def __call__(self, tensors: Tensors, operands: Tensors) -> None:
        """Launch it on the current device and stream.

        The tensors are the first fields of `Call`, the operands what the kernel takes beside the call: each is None in
        every launch, or in none.
        """
        if self._compiled is None or _is_watched():
            self._launch_by_triton(tensors, operands)
            return
        addresses = [x.data_ptr() for x in self._present((*tensors, *operands))]
        static_launch(*self._fixed, (*addresses, *self._numbers), _current_stream(tensors[0].get_device()))

    def _launch_by_triton(self, tensors: Tensors, operands: Tensors) -> None:
        taken: tuple[Any, ...] = operands
        if self._record is not None:
            fields = len(self._record._fields)
            taken = (self._record(*operands[:fields]), *operands[fields:])
        call = Call(*map(_bytes, tensors), *self.numbers)
        self._remember(run(self.kernel, self.programs, self.how, call, *taken, self.tile), tensors, operands)

    def _remember(self, compiled: Any, tensors: Tensors, operands: Tensors) -> None:
        """What Triton has compiled and launched; nothing where it cannot be launched without Triton."""
        if static_launch is None or _current_stream is None or compiled is None:  # by the interpreter, none is
            return
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in _UNUSED):
            return
        scratch = [None for name in _SCRATCH if hasattr(metadata, name)]
        given = [i for i, x in enumerate((*tensors, *operands)) if x is not None]
        numbers = [number for number in self.numbers if number is not None]
        kinds = "O" * len(given) + "".join(map(_kind, numbers)) + "O" * len(scratch)
        self._fixed = (compiled.function, self.programs, 1, 1, metadata.num_warps, metadata.shared, kinds)
        self._numbers, self._present = (*numbers, *scratch), operator.itemgetter(*given)
        self._compiled = compiled


def on_device(index: int | None) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched and tensors allocated on the current device; the interpreter of the tests has none, None."""
    if index is None or index == _current_device():
        return _nothing
    return torch.cuda.device(index)


_nothing = contextlib.nullcontext()


def run(kernel: Any, programs: int, how: Launch, call: Call, *operands_and_tile: Any) -> Any:
    """Compile a kernel, unless it is, and launch it; what Triton has compiled, or None under its interpreter."""
    *operands, tile = operands_and_tile
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages}
    return entry[(programs,)](kernel, call[:TENSORS], tuple(operands), *call[TENSORS:], tile, **options)


def _kind(number: int | float) -> str:
    """Of an argument, as `static_launch` names it and Triton chooses it."""
    if isinstance(number, float):
        return "f"
    return "i" if -(1 << 31) <= number < 1 << 31 else "l"


def _bytes(x: Tensor | None) -> Tensor | None:
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def _is_watched() -> bool:
    """Whether a profiler wants to hear of each launch from Triton."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (enter is not None and bool(enter.calls)) or (leave is not None and bool(leave.calls))

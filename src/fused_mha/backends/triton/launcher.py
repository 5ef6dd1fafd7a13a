"""One kernel of a call, launched again and again with other tensors of the same sizes; `launch` makes these.

Triton's own way to a kernel takes 15 microseconds, in which it looks at every argument. It is taken once; then
`torch._C._StaticCudaLauncher`, which Inductor's programs use, is given addresses, in less than one. That name is not
public: where it is missing, Triton's way is taken each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from fused_mha.backends.triton.entry import entry
from fused_mha.backends.triton.tile_config import Launch
from fused_mha.backends.triton.tiles import TENSORS, Call

Operand = Tensor | tuple[Tensor | None, ...] | None
_static: Any = getattr(torch._C, "_StaticCudaLauncher", None) if torch.version.hip is None else None
static_launch: Any = getattr(_static, "_launch_kernel", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_SCRATCH = ("global_scratch_size", "profile_scratch_size")  # more pointers of a kernel that has them, to nothing here
_UNUSED = (*_SCRATCH, "launch_cooperative_grid", "launch_pdl")


class Launcher:
    """A kernel with what does not change: the number of programs, the numbers of the `Call`, and the tile."""

    def __init__(self, kernel: Any, programs: int, how: Launch, call: Call, tile: Any) -> None:
        self.kernel, self.programs, self.how, self.tile = kernel, programs, how, tile
        self.numbers = tuple(call[TENSORS:])
        self._given = tuple(number for number in self.numbers if number is not None)
        self._compiled: Any = None  # which keeps the code loaded
        self._kinds = ""
        self._scratch: tuple[None, ...] = ()

    def __call__(self, tensors: tuple[Any, ...], *operands: Operand) -> None:
        """Launch it on the current device and stream.

        The tensors are the first fields of `Call`, the operands what the kernel takes beside the call: each is None in
        every launch, or in none.
        """
        compiled = self._compiled
        if compiled is None or _is_watched():
            call = Call(*map(_bytes, tensors), *self.numbers)
            self._remember(run(self.kernel, self.programs, self.how, call, *operands, self.tile), tensors, operands)
            return
        arguments: list[Any] = [x.data_ptr() for x in tensors if x is not None]
        arguments += self._given
        for x in operands:
            if isinstance(x, Tensor):
                arguments.append(x.data_ptr())
            elif x is not None:
                arguments += [y.data_ptr() for y in x if y is not None]
        static_launch(
            compiled.function,
            self.programs,
            1,
            1,
            compiled.metadata.num_warps,
            compiled.metadata.shared,
            self._kinds,
            (*arguments, *self._scratch),
            _current_stream(tensors[0].get_device()),
        )

    def _remember(self, compiled: Any, tensors: tuple[Tensor | None, ...], operands: tuple[Operand, ...]) -> None:
        """What Triton has compiled and launched; nothing where it cannot be launched without Triton."""
        if static_launch is None or _current_stream is None or compiled is None:  # by the interpreter, none is
            return
        if compiled.metadata.num_ctas != 1 or any(getattr(compiled.metadata, name, 0) for name in _UNUSED):
            return
        self._scratch = tuple(None for name in _SCRATCH if hasattr(compiled.metadata, name))
        given, taken = (sum(x is not None for x in _flat(of)) for of in (tensors, operands))
        self._kinds = "O" * given + "".join(map(_kind, self._given)) + "O" * (taken + len(self._scratch))
        self._compiled = compiled


def on_device(index: int | None) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched and tensors allocated on the current device; the interpreter of the tests has none, None."""
    if index is None or index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device(index)


_nothing = contextlib.nullcontext()


def run(kernel: Any, programs: int, how: Launch, call: Call, *operands_and_tile: Any) -> Any:
    """Compile a kernel, unless it is, and launch it; what Triton has compiled, or None under its interpreter."""
    *operands, tile = operands_and_tile
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages}
    return entry[(programs,)](kernel, call[:TENSORS], *call[TENSORS:], tuple(operands), tile, **options)


def _flat(operands: tuple[Operand, ...]) -> Iterator[Tensor | None]:
    for x in operands:
        if isinstance(x, tuple):
            yield from x
        else:
            yield x


def _kind(number: int | float) -> str:
    """Of an argument, as `static_launch` names it and Triton chooses it."""
    if isinstance(number, float):
        return "f"
    return "i" if -(1 << 31) <= number < 1 << 31 else "l"


def _bytes(x: Tensor | None) -> Tensor | None:
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def _is_watched() -> bool:
    """Whether a profiler wants to hear of each launch from Triton."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and bool(hook.calls) for hook in hooks)

"""Which assembler makes Hopper's code of the kernels: that of CUDA 12.8, which Triton takes, writes wrong code there.

It lets a product read a register that nothing has set, where the tiles of keys and values have different widths and
pass through registers (triton issues 10486, 10573, 11366; `tests/triton_kernels/sass.py` finds it). Triton's wheels
bring a newer one for later chips, which `entry` takes here, around its compilations only; `info` prints the choice.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

WRONG = "12.8"
HOPPER = 9  # major compute capability
OPTIONS = "-O3"  # the default; it gives these compilations a key of their own in Triton's cache of files
_lock = threading.RLock()  # Triton's setting is of the whole process


class Assembler:
    """Of a chip: the path of what takes the place of Triton's own, or None; whether its code is right; and in words."""

    def __init__(self, path: str | None, is_right: bool, summary: str) -> None:
        self.path, self.is_right, self.summary = path, is_right, summary


def choice(capability: int) -> Assembler:
    """For a chip of that major compute capability, whatever its driver takes."""
    if capability != HOPPER:
        return Assembler(None, True, "Triton's")
    try:
        own, newer = triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell
    except (AttributeError, RuntimeError) as error:
        return Assembler(None, False, f"Triton's, since a newer one is not found ({error})")
    if own.version != WRONG:
        return Assembler(None, True, f"Triton's, {own.version}")
    if newer.version == WRONG or not hasattr(triton.JITFunction, "_do_compile"):
        return Assembler(None, False, f"Triton's, {own.version}, since it can't be replaced")
    return Assembler(newer.path, True, f"{newer.version} in place of Triton's {own.version}")


@contextlib.contextmanager
def used(assembler: Assembler) -> Iterator[dict[str, str]]:
    """Compilations within are assembled by it; yields the options that they have to be given."""
    if assembler.path is None:
        yield {}
        return
    with _lock, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.ptxas = assembler.path
        yield {"ptx_options": OPTIONS}


@functools.cache
def of_device(index: int) -> Assembler:
    """The choice for a GPU; Triton's own where the driver is too old to load what the newer one makes."""
    found = choice(torch.cuda.get_device_capability(index)[0])
    if found.path is None:
        return found
    try:
        with torch.cuda.device(index), used(found) as options:
            _nothing.warmup(grid=(1,), **options).run  # noqa: B018 - loads it
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Assembler(None, False, f"Triton's, {WRONG}, since the driver refuses the newer one's code ({reason})")
    return found


def assembled(kernel: Any) -> Any:
    """The kernel; where Triton compiles it for a GPU, it does so by the assembler of that."""
    compile_by_tritons = getattr(kernel, "_do_compile", None)  # there is none under the interpreter
    if compile_by_tritons is None:
        return kernel

    def compile_by_ours(
        key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> Any:
        with used(of_device(device)) as added:
            options = dataclasses.replace(options, **added)
            return compile_by_tritons(key, signature, device, constants, options, attributes, warmup)

    kernel._do_compile = compile_by_ours
    return kernel


@triton.jit
def _nothing():
    tl.static_assert(True)

"""The CPU library: finds it, checks it, and has it register its kernels with torch. `backends.cpu` calls this.

The library is a plain C-ABI one (`csrc/c_api.h`), built without torch. It takes tensors, memory and threads from torch
by the functions of torch's stable C API, which it looks up in torch's own library.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 7
ISA_VARIABLE = "FUSED_MHA_ISA"
TILE_ISA = "avx512_amx"  # which multiplies bfloat16 by tiles
NAMES = ("libfused_mha.so", "libfused_mha.dylib")

_EXP2_DTYPES = {torch.float32: 0, torch.float64: 1}  # as `enum fused_mha_dtype` numbers them
_HALF_DTYPES = {torch.bfloat16: 2, torch.float16: 3}


class Library:
    """The loaded library; raises RuntimeError where it does not fit this package or the machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        version = getattr(self._c, "fused_mha_abi_version", None)
        if version is None or version() != ABI_VERSION:
            raise RuntimeError(
                f"{path} has ABI version {None if version is None else version()}, this package needs {ABI_VERSION}: "
                "it is of another version of fused_mha. Reinstall the package."
            )
        for name in ("fused_mha_last_error", "fused_mha_available_isa", "fused_mha_isa", "fused_mha_cpu_name"):
            getattr(self._c, name).restype = ctypes.c_char_p
        self._functions = {name: self._function(name) for name in ("register_operators", "set_isa", "exp2")}
        self._c.fused_mha_set_parallel_for(_torch_parallel_for())
        self.cpu_name: str = self._c.fused_mha_cpu_name().decode()  # as CPUID gives it
        self._best_isa = self.available_isas[-1]
        self._use(self._c.fused_mha_isa().decode())
        if wanted := os.environ.get(ISA_VARIABLE):
            self.set_isa(wanted)

    def _has_tiles(self, dtype: int) -> bool:
        return bool(self._function("cpu_has_tiles")(ctypes.c_int64(dtype)))

    def register_operators(self) -> None:
        """Give torch the kernels of `torch.ops.fused_mha`; once in a process."""
        self._check(self._functions["register_operators"](ctypes.c_void_p(_torch_library()._handle)))

    def _function(self, name: str) -> Any:
        function = getattr(self._c, f"fused_mha_{name}")
        function.restype = ctypes.c_int64
        return function

    @property
    def available_isas(self) -> list[str]:
        """The compiled instruction sets that this machine runs, the best one in bfloat16 last."""
        names = []
        while (name := self._c.fused_mha_available_isa(ctypes.c_int64(len(names)))) is not None:
            names.append(name.decode())
        return names

    def set_isa(self, name: str) -> None:
        """Use an instruction set from now on, while no call runs; RuntimeError if there is no such."""
        if self._functions["set_isa"](name.encode()) != 0:
            raise RuntimeError(
                f"{ISA_VARIABLE} must be one of {', '.join(self.available_isas)}, which this installation has for this "
                f"machine; got {name!r}"
            )
        self._use(name)

    @property
    def is_best_in_bf16(self) -> bool:
        """Whether the instruction set in use has the fastest products of bfloat16 that this machine offers."""
        return self.isa == self._best_isa and torch.bfloat16 not in self.tile_dtypes

    @property
    def uses_tiles(self) -> bool:
        """Whether products of bfloat16 take the processor's tiles (AMX)."""
        return self.isa == TILE_ISA

    def _use(self, isa: str) -> None:
        self.isa = isa  # the instruction set in use
        # Of whose tiles (AMX) torch's libraries make use, and this instruction set does not.
        self.tile_dtypes = tuple(
            dtype
            for dtype, code in _HALF_DTYPES.items()
            if self._has_tiles(code) and not (dtype is torch.bfloat16 and self.uses_tiles)
        )

    def exp2(self, x: Tensor) -> Tensor:
        """The kernels' exp2 of a contiguous fp32 or fp64 tensor, for its test."""
        result = torch.empty_like(x)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, result))
        self._check(
            self._functions["exp2"](*pointers, ctypes.c_int64(x.numel()), ctypes.c_int64(_EXP2_DTYPES.get(x.dtype, -1)))
        )
        return result

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self._c.fused_mha_last_error().decode())


def _torch_library() -> ctypes.CDLL:
    """Torch's own library, for its stable C API and its parallel loop, which follows `torch.set_num_threads`."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    raise RuntimeError(f"no torch library in {folder}")


def _torch_parallel_for() -> ctypes.c_void_p:
    return ctypes.cast(_torch_library().torch_parallel_for, ctypes.c_void_p)


def load(folders: Iterable[str]) -> Library | None:
    """The library in the first of a package's folders that has it, or None: it was installed without a C++ compiler.

    An editable installation has its compiled files in another folder than the sources.
    """
    paths = (Path(folder) / name for folder in folders for name in NAMES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    try:
        return Library(path)
    except RuntimeError as error:
        if not _is_imported_for_a_command():
            raise
        sys.exit(f"fused_mha: {error}")  # who types a command wants the message, not our stack


def _is_imported_for_a_command() -> bool:
    """Whether `python -m fused_mha.<command>` imports the package: Python has no path of the command yet."""
    return sys.argv[:1] == ["-m"] and any(x.removeprefix("-m").startswith("fused_mha") for x in sys.orig_argv)

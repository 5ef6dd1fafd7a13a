"""The machine's measured peak of fp32 multiply-adds, the yardstick of `attention_reports.fma_share`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
# OpenMP's idle threads spin for about a millisecond after torch's turn: little of a call that is this long.
SECONDS = 0.04


class FmaPeak:
    """Called, it keeps ``threads`` threads busy with `flops` operations; raises RuntimeError without a C compiler."""

    def __init__(self, threads: int) -> None:
        self._library = _compile()
        self._library.multiply_add.restype = ctypes.c_float
        self._library.flops_per_step.restype = ctypes.c_int64
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        steps = 1 << 16
        while True:
            self._steps = ctypes.c_int64(steps)
            start = time.perf_counter()
            self()
            if (elapsed := time.perf_counter() - start) > SECONDS / 2:
                break
            steps *= 2
        self._steps = ctypes.c_int64(int(steps * SECONDS / elapsed))

    @property
    def flops(self) -> int:
        """Operations of one call, of all threads together."""
        return self._steps.value * self._library.flops_per_step() * self._threads

    def __call__(self) -> None:
        """Run the multiply-adds; ctypes lets go of the interpreter's lock meanwhile."""
        for _ in self._pool.map(self._library.multiply_add, [self._steps] * self._threads):
            pass


def _compile() -> ctypes.CDLL:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{compiler} failed: {result.stderr.strip().splitlines()[-1:]}")
        return ctypes.CDLL(str(library))

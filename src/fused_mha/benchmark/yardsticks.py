"""What this machine can do at most, measured: fp32 multiply-adds and bytes read. Speeds are given as shares of it."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from fused_mha.benchmark.harness import Contender, interleave

HERE = Path(__file__).resolve().parent
# After torch's turn OpenMP's idle threads spin for about 1 ms, which has to be little beside a call of the yardstick.
SECONDS = 0.04


class Yardstick:
    """Called, it does `work` operations or bytes, of all threads together, in about `SECONDS`."""

    def __init__(self, runs: list[Callable[[int], object]], work_per_step: int) -> None:
        """Each thread has a function of ``runs``, of the number of steps; all together do ``work_per_step``."""
        self._runs = runs
        self._work_per_step = work_per_step
        self._pool = ThreadPoolExecutor(len(runs))
        self._steps = 1
        while True:
            start = time.perf_counter()
            self()
            if (elapsed := time.perf_counter() - start) > SECONDS / 2:
                break
            self._steps *= 2
        self._steps = max(1, round(self._steps * SECONDS / elapsed))

    @property
    def work(self) -> int:
        """Of one call."""
        return self._steps * self._work_per_step

    def __call__(self) -> None:
        """Do the work; ctypes lets go of the interpreter's lock meanwhile."""
        for _ in self._pool.map(lambda run: run(self._steps), self._runs):
            pass


def fma_peak(threads: int) -> Yardstick:
    """Operations of multiply-adds that never leave the registers; raises RuntimeError without a C compiler."""
    library = _compile("fma_peak.c")
    library.multiply_add.restype = ctypes.c_float
    library.multiply_add.argtypes = [ctypes.c_int64]
    library.flops_per_step.restype = ctypes.c_int64
    return Yardstick([library.multiply_add] * threads, library.flops_per_step() * threads)


def read_bandwidth(threads: int, size: int) -> Yardstick:
    """Bytes of a buffer of ``size`` bytes, read again and again; raises RuntimeError without a C compiler."""
    library = _compile("read_bandwidth.c")
    library.sum.restype = ctypes.c_float
    library.sum.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    parts = torch.ones(threads, size // (4 * threads))

    def reader(thread: int) -> Callable[[int], object]:
        return lambda steps: library.sum(parts[thread].data_ptr(), parts.shape[1], steps)

    return Yardstick([reader(thread) for thread in range(threads)], parts.nbytes)


class Share(NamedTuple):
    """Billions of operations or bytes a second of a call, and of the yardstick in the same rounds."""

    speed: float
    highest: float
    share: float


def share_of(yardstick: Yardstick, call: Contender, work: int, seconds: float) -> Share:
    """The share of the yardstick's speed that a call reaches, the median over the rounds."""
    rounds = interleave({"call": call, "yardstick": yardstick}, seconds)
    speeds = [(work / turn["call"] / 1e6, yardstick.work / turn["yardstick"] / 1e6) for turn in rounds]
    speed, highest = (statistics.median(column) for column in zip(*speeds, strict=True))
    return Share(speed, highest, statistics.median(mine / most for mine, most in speeds))


def _compile(source: str) -> ctypes.CDLL:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "yardstick.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(HERE / source), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{compiler} failed: {result.stderr.strip().splitlines()[-1:]}")
        return ctypes.CDLL(str(library))

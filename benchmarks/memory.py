"""The memory that a call takes beside its inputs and results, measured in a fresh process.

There torch's profiler counts the allocations, and the process's high-water mark tells what the profiler does not see.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_mha.benchmark.memory import MIB, allocated

Call = Callable[[], tuple[Tensor, ...]]


class Measured(NamedTuple):
    """MiB of one contender."""

    inputs: float
    results: float
    beside: float  # the peak of the allocations, less the results
    resident: float | None  # the same of the process's resident memory; None without Linux's /proc

    def __str__(self) -> str:
        return f"{self.beside:.1f} (resident {'unknown' if self.resident is None else f'{self.resident:.1f}'})"


def in_fresh_process(file: str, *arguments: object) -> Measured:
    """What ``file`` prints by `print_measured` when it is run with the arguments."""
    command = [sys.executable, file, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # the profiler writes to stderr
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return Measured(**json.loads(result.stdout))


def print_measured(run: Call, inputs: Iterable[Tensor], tiny_run: Call, threads: int) -> None:
    """Measure ``run`` in this process, which has done nothing else; ``tiny_run`` is the same call, very small."""
    torch.set_num_threads(threads)
    tiny_run()  # starts the threads
    resident = _resident(run)
    peak, results = allocated(run)
    print(json.dumps(Measured(_mib(inputs), _mib(results), peak - _mib(results), resident)._asdict()))


def _mib(tensors: Iterable[Tensor]) -> float:
    return sum(x.untyped_storage().nbytes() for x in tensors) / MIB


def _resident(run: Call) -> float | None:
    """The same of the process's resident memory.

    Not by `resource`'s ru_maxrss: that starts at what the parent process had when it started this one.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        results = run()
        return _status("VmHWM") - before - _mib(results)
    except OSError:
        return None


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024

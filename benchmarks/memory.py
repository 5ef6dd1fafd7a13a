"""The memory that a call takes beside its inputs and results, measured in a fresh process.

There torch's profiler counts the allocations, and the process's high-water mark tells what the profiler does not see.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2.0**20
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
    results, beside = _allocated(run)
    print(json.dumps(Measured(_mib(inputs), results, beside, resident)._asdict()))


def _mib(tensors: Iterable[Tensor]) -> float:
    return sum(x.untyped_storage().nbytes() for x in tensors) / MIB


def _allocated(run: Call) -> tuple[float, float]:
    """The size of what a call returns, and the largest sum of its allocations less that."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = sorted((event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events)
    peak = max(itertools.accumulate(change for _, _, change in changes)) / MIB
    return _mib(results), peak - _mib(results)


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

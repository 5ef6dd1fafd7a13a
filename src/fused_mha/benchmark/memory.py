"""The memory that a call allocates: the command prints it, `benchmarks/memory.py` measures it in fresh processes."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2.0**20
Call = Callable[[], tuple[Tensor, ...]]


def mib(tensors: Iterable[Tensor]) -> float:
    """The MiB of the tensors' storages."""
    return sum(x.untyped_storage().nbytes() for x in tensors) / MIB


def allocated(run: Call) -> tuple[float, float]:
    """The size of what a call returns, and the largest sum of its allocations less that."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = sorted((event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events)
    peak = max(itertools.accumulate(change for _, _, change in changes)) / MIB
    return mib(results), peak - mib(results)


def allocated_on_gpu(run: Callable[[], object]) -> float:
    """The MiB that a call allocates at most on the GPU, results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MIB

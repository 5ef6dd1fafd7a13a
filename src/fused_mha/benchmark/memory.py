"""The memory that a call allocates: the command prints it, `benchmarks/memory.py` measures it in fresh processes."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2.0**20
Results = TypeVar("Results")


def allocated(run: Callable[[], Results]) -> tuple[float, Results]:
    """The MiB that a call on the CPU allocates at most, its results included, and these."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = sorted((event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events)
    return max(itertools.accumulate(change for _, _, change in changes), default=0) / MIB, results


def allocated_on_gpu(run: Callable[[], object]) -> float:
    """The same on the current GPU."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MIB

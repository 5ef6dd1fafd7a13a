"""The memory that attention takes beside its inputs and outputs: `bench_attention`'s report of it.

Each contender runs in a fresh process, where torch's profiler counts the allocations and the process's high-water mark
tells what the profiler does not see: `python benchmarks/attention_memory.py CALL CONTENDER THREADS QUICK`.
"""

from __future__ import annotations

import argparse
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

from attention_cells import Attention, Cell, bmm, forward, forward_backward, ours, sdpa, tensors

from run import Report

MIB = 2.0**20
PER_THREAD = 2.0  # MiB of workspace
CELL, QUICK_CELL, TINY_CELL = Cell(1, 16, 2048, 2048, 64), Cell(1, 4, 512, 512, 64), Cell(1, 2, 64, 64, 64)


class MemoryCall(NamedTuple):
    """One way of calling, and whether our promise covers it: 2 MiB a thread and the size of key and value."""

    contenders: dict[str, Attention]
    training: bool = False
    is_promised: bool = True


CALLS = {
    "forward": MemoryCall({"ours": ours(), "torch": sdpa()}),
    "forward, averaged weights": MemoryCall({"ours": ours(weights=True), "torch": bmm(weights=True)}),
    "forward and backward": MemoryCall({"ours": ours(), "torch": sdpa()}, training=True, is_promised=False),
}


class Measured(NamedTuple):
    """MiB of one contender."""

    inputs: float
    results: float
    beside: float  # the peak of the allocations, less the results
    resident: float | None  # the same of the process's resident memory; None without Linux's /proc

    def __str__(self) -> str:
        return f"{self.beside:.1f} (resident {'unknown' if self.resident is None else f'{self.resident:.1f}'})"


def memory(options: argparse.Namespace) -> Report:
    """Ours beside torch's, in every call."""
    cell = QUICK_CELL if options.quick else CELL
    promised = options.threads * PER_THREAD + (tensors(cell).key.nbytes + tensors(cell).value.nbytes) / MIB
    lines = [f"at {cell}, in MiB beside inputs and outputs; promised: at most {promised:.1f}"]
    values: dict[str, object] = {"cell": str(cell), "promised_mib": promised}
    passes = True
    for name, call in CALLS.items():
        measured = {contender: _in_fresh_process(name, contender, options) for contender in call.contenders}
        kept = measured["ours"].beside <= promised
        verdict = ("PASS" if kept else "MISSED") if call.is_promised else "no promise"
        passes = passes and (kept or not call.is_promised)
        inputs, results, *_ = measured["ours"]
        numbers = ", ".join(f"{contender} {numbers}" for contender, numbers in measured.items())
        lines.append(f"{verdict:<10} {name}: inputs {inputs:.1f}, outputs {results:.1f}; {numbers}")
        values[name] = {contender: numbers._asdict() for contender, numbers in measured.items()}
    return Report(lines, values, passes)


REPORTS = {"memory": memory}


def _contender(call: MemoryCall, contender: str, cell: Cell) -> Callable[[], tuple[Tensor, ...]]:
    given = tensors(cell)
    attention = call.contenders[contender]
    if call.training:
        return forward_backward(attention, given.inputs, (given.grad_output,))
    return forward(attention, given.inputs)


def _mib(results: Iterable[Tensor]) -> float:
    return sum(x.untyped_storage().nbytes() for x in results) / MIB


def _in_fresh_process(name: str, contender: str, options: argparse.Namespace) -> Measured:
    command = [sys.executable, __file__, name, contender, str(options.threads), str(int(options.quick))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # the profiler writes to stderr
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return Measured(**json.loads(result.stdout))


def _measure(name: str, contender: str, threads: str, quick: str) -> Measured:
    torch.set_num_threads(int(threads))
    call, cell = CALLS[name], QUICK_CELL if quick == "1" else CELL
    _contender(call, contender, TINY_CELL)()  # starts the threads
    run = _contender(call, contender, cell)
    resident = _resident(run)
    results, beside = _allocated(run)
    return Measured(_mib(tensors(cell).inputs), results, beside, resident)


def _allocated(run: Callable[[], tuple[Tensor, ...]]) -> tuple[float, float]:
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


def _resident(run: Callable[[], tuple[Tensor, ...]]) -> float | None:
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


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])._asdict()))

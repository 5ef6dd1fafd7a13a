"""The memory that attention takes beside its inputs and outputs: `bench_attention`'s report of it.

Each contender runs in a process of its own: `python benchmarks/attention_memory.py CALL CONTENDER THREADS QUICK`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fused_mha.benchmark.attention_cells import Attention, Cell, bmm, forward, forward_backward, ours, sdpa, tensors
from fused_mha.benchmark.harness import Report
from fused_mha.benchmark.memory import MIB
from memory import in_fresh_process, print_measured

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


def memory(options: argparse.Namespace) -> Report:
    """Ours beside torch's, in every call."""
    cell = QUICK_CELL if options.quick else CELL
    promised = options.threads * PER_THREAD + (tensors(cell).key.nbytes + tensors(cell).value.nbytes) / MIB
    lines = [f"at {cell}, in MiB beside inputs and outputs; promised: at most {promised:.1f}"]
    values: dict[str, object] = {"cell": str(cell), "promised_mib": promised}
    passes = True
    for name, call in CALLS.items():
        measured = {
            contender: in_fresh_process(__file__, name, contender, options.threads, int(options.quick))
            for contender in call.contenders
        }
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


def _main(name: str, contender: str, threads: str, quick: str) -> None:
    call, cell = CALLS[name], QUICK_CELL if quick == "1" else CELL
    tiny_run = _contender(call, contender, TINY_CELL)
    print_measured(_contender(call, contender, cell), tensors(cell).inputs, tiny_run, int(threads))


if __name__ == "__main__":
    _main(*sys.argv[1:])

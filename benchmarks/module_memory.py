"""The memory that a call of the module takes beside its inputs and results: `bench_module`'s reports of it.

Each contender runs in a process of its own:
`python benchmarks/module_memory.py N L E H TRAINING WEIGHTS CONTENDER THREADS`, flags as 0 and 1.
"""

from __future__ import annotations

import argparse
import sys

from fused_mha.benchmark.harness import Report
from fused_mha.benchmark.module_cells import (
    QUICK_SELF_ATTENTION,
    SELF_ATTENTION,
    Cell,
    Mode,
    Run,
    inference,
    inputs,
    modules,
    training_step,
)
from fused_mha.benchmark.suites import GROWING, growing_cells
from memory import in_fresh_process, print_measured

CONTENDERS = ("ours", "torch")  # in the order of `Modules`
STEPS = {"": Mode(training=True), ", weights": Mode(training=True, weights=True)}
(TINY_CELL,) = QUICK_SELF_ATTENTION


def training(options: argparse.Namespace) -> Report:
    """Training steps at two sizes, with and without weights."""
    cells = QUICK_SELF_ATTENTION if options.quick else SELF_ATTENTION[:2]
    return _report([(f"{cell}{name}", cell, mode) for cell in cells for name, mode in STEPS.items()], options.threads)


def growth(options: argparse.Namespace) -> Report:
    """The calls of the suite `growth`, of 128 to 4,096 tokens."""
    cells = QUICK_SELF_ATTENTION if options.quick else growing_cells()
    calls = [(f"{name}, {cell}", cell, mode) for name, mode in GROWING.items() for cell in cells]
    return _report(calls, options.threads)


def _report(calls: list[tuple[str, Cell, Mode]], threads: int) -> Report:
    lines, rows = ["in MiB beside inputs, outputs and gradients"], []
    for name, cell, mode in calls:
        flags = int(mode.training), int(mode.weights)
        measured = {
            contender: in_fresh_process(__file__, cell.N, cell.L, cell.E, cell.H, *flags, contender, threads)
            for contender in CONTENDERS
        }
        lines.append(f"{name}: " + ", ".join(f"{contender} {numbers}" for contender, numbers in measured.items()))
        rows.append({"name": name, **{contender: numbers._asdict() for contender, numbers in measured.items()}})
    return Report(lines, {"cells": rows})


REPORTS = {"memory of a training step": training, "memory against length": growth}


def _main(N: str, L: str, E: str, H: str, training: str, weights: str, contender: str, threads: str) -> None:
    mode = Mode(training=training == "1", weights=weights == "1")
    cell = Cell(int(N), int(L), int(L), int(E), int(H))

    def call(size: Cell) -> Run:
        module = modules(size, mode)[CONTENDERS.index(contender)]
        return (training_step if mode.training else inference)(module, size, mode)

    print_measured(call(cell), inputs(cell)[:1], call(TINY_CELL), int(threads))


if __name__ == "__main__":
    _main(*sys.argv[1:])

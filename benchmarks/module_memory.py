"""The memory that a training step of the module takes beside its inputs and results: `bench_module`'s report of it.

Each contender runs in a process of its own: `python benchmarks/module_memory.py PLACE WEIGHTS CONTENDER THREADS QUICK`.
"""

from __future__ import annotations

import argparse
import sys

from fused_mha.benchmark.harness import Report
from fused_mha.benchmark.module_cells import QUICK_SELF_ATTENTION, SELF_ATTENTION, Mode, inputs, modules, training_step
from memory import in_fresh_process, print_measured

CONTENDERS = ("ours", "torch")  # in the order of `Modules`
CELLS, QUICK_CELLS = SELF_ATTENTION[:2], QUICK_SELF_ATTENTION
(TINY_CELL,) = QUICK_SELF_ATTENTION


def memory(options: argparse.Namespace) -> Report:
    """Ours beside torch's, with and without weights."""
    lines, rows = ["in MiB beside inputs, outputs and gradients"], []
    for place, cell in enumerate(QUICK_CELLS if options.quick else CELLS):
        for weights in (False, True):
            measured = {
                contender: in_fresh_process(
                    __file__, place, int(weights), contender, options.threads, int(options.quick)
                )
                for contender in CONTENDERS
            }
            name = f"{cell}, weights" if weights else str(cell)
            lines.append(f"{name}: " + ", ".join(f"{contender} {numbers}" for contender, numbers in measured.items()))
            rows.append({"name": name, **{contender: numbers._asdict() for contender, numbers in measured.items()}})
    return Report(lines, {"cells": rows})


REPORTS = {"memory of a training step": memory}


def _main(place: str, weights: str, contender: str, threads: str, quick: str) -> None:
    cell = (QUICK_CELLS if quick == "1" else CELLS)[int(place)]
    mode = Mode(training=True, weights=weights == "1")
    run, tiny_run = (
        training_step(modules(size, mode)[CONTENDERS.index(contender)], size, mode) for size in (cell, TINY_CELL)
    )
    print_measured(run, inputs(cell)[:1], tiny_run, int(threads))


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Many short sequences on a machine that has other work: `bench_module`'s report of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch

from fused_mha.benchmark.harness import GroupBar, Report, measure
from fused_mha.benchmark.module_cases import module_case
from fused_mha.benchmark.module_cells import QUICK_SHORT_SEQUENCES, SHORT_SEQUENCES, Mode

BUSY = GroupBar(1.0, 2.0)  # the first for each cell, the second for their mean
THREADS, PROCESSES = 2, 4
TITLE = "busy host"
# Its parent's end, by whatever signal, ends it too.
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that do nothing but compute."""
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", LOOP, str(os.getpid())])
            stack.callback(process.wait)
            stack.callback(process.kill)  # before the wait: the last callback comes first
            processes.append(process)
        yield processes


def busy_host(options: argparse.Namespace) -> Report:
    """Two threads beside four busy processes: a thread that the system takes away keeps the others waiting."""
    rows = []
    torch.set_num_threads(THREADS)
    try:
        for cell in QUICK_SHORT_SEQUENCES if options.quick else SHORT_SEQUENCES:
            case = module_case(TITLE, str(cell), cell, Mode(), BUSY.at_least)
            case.verify()
            with busy_processes(PROCESSES):
                rows.append(measure(case, 4 * options.seconds))  # a call takes up to a second there
    finally:
        torch.set_num_threads(options.threads)
    mean = statistics.geometric_mean(row.ratio for row in rows)
    lines = [f"{THREADS} threads, {PROCESSES} busy processes", *map(str, rows)]
    lines.append(f"geometric mean {mean:.2f}x (aim {BUSY.aim:.2f})")
    cells = [{"name": row.name, "ratio": row.ratio, "timings": row.rounded_timings} for row in rows]
    values = {"threads": THREADS, "busy_processes": PROCESSES, "cells": cells, "geometric_mean": mean}
    return Report(lines, {**values, **BUSY._asdict()}, all(row.passes for row in rows))


REPORTS = {TITLE: busy_host}

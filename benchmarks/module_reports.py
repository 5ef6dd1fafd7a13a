"""What `bench_module` measures beside the ratios to torch: shares of what the machine can do, and torch.compile."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

import attention_cells
from module_cells import (
    QUICK_SELF_ATTENTION,
    SELF_ATTENTION,
    SMALL,
    Cell,
    Mode,
    assert_close,
    inference,
    modules,
    training_step,
)
from yardsticks import fma_peak, read_bandwidth, share_of

from run import GroupBar, Report, interleave, skipped

PEAK_SHARE = GroupBar(0.75, 0.85)  # of the first cell
READ_SHARE = 0.7
COMPILED = 0.95  # eager's time over compiled's: no slower, but for what two equal contenders differ by
COMPILED_CELLS = (Cell(8, 128, 128, 256, 8), SMALL[0])
DECODING = tuple(attention_cells.Cell(8, 12, 1, S, 64) for S in (4096, 8192))


def fma_share(options: argparse.Namespace) -> Report:
    """Operations a second of the projections and the core over the machine's, in the same rounds."""
    try:
        peak = fma_peak(options.threads)
    except RuntimeError as error:
        return skipped(str(error))
    lines, cells = [], []
    for cell in QUICK_SELF_ATTENTION if options.quick else SELF_ATTENTION:
        call = inference(modules(cell, Mode()).ours, cell, Mode())
        speed, highest, share = share_of(peak, call, cell.flops, options.seconds / 2)
        bar = "" if cells else f" (at least {PEAK_SHARE.at_least:.0%}, aim {PEAK_SHARE.aim:.0%})"
        lines.append(f"{cell}: {speed:.0f} GF/s of {highest:.0f}, {share:.0%}{bar}")
        cells.append({"name": str(cell), "gflops": speed, "peak_gflops": highest, "share": share})
    return Report(lines, {"cells": cells, **PEAK_SHARE._asdict()}, cells[0]["share"] >= PEAK_SHARE.at_least)


def compiled(options: argparse.Namespace) -> Report:
    """Our module under `torch.compile` beside the same module without."""
    backend = "aot_eager" if options.quick else "inductor"  # which compiles C++, for many seconds
    lines, rows = [], []
    for cell in QUICK_SELF_ATTENTION if options.quick else COMPILED_CELLS:
        for name, call in (("inference", inference), ("training step", training_step)):
            mode = Mode(training=call is training_step)
            torch.compiler.reset()  # or a second size would be compiled for any size
            ours = modules(cell, mode).ours
            ours_compiled: Any = torch.compile(ours, backend=backend)
            runs = {"eager": call(ours, cell, mode), "compiled": call(ours_compiled, cell, mode)}
            assert_close(runs["compiled"](), runs["eager"]())
            rounds = interleave(runs, options.seconds)
            ms = {contender: statistics.median(turn[contender] for turn in rounds) for contender in runs}
            ratio = statistics.median(turn["eager"] / turn["compiled"] for turn in rounds)
            times = "  ".join(f"{contender} {time:.3f}" for contender, time in ms.items())
            lines.append(f"{name}, {cell}: {ratio:.2f}x (bar {COMPILED:.2f})  ms: {times}")
            rows.append({"name": f"{name}, {cell}", "ms": ms, "ratio": ratio})
    passes = all(row["ratio"] >= COMPILED for row in rows)
    return Report(lines, {"backend": backend, "cells": rows, "bar": COMPILED}, passes)


def decoding(options: argparse.Namespace) -> Report:
    """Bytes of key and value that one query reads a second, over what the machine can read, in the same rounds."""
    lines, rows = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for cell in attention_cells.QUICK_DECODING if options.quick else DECODING:
            given = attention_cells.tensors(cell, dtype).inputs
            call = attention_cells.forward(attention_cells.ours(), given)
            assert_close(call(), attention_cells.forward(attention_cells.sdpa(), given)())
            size = given[1].nbytes + given[2].nbytes
            try:
                bandwidth = read_bandwidth(options.threads, size)
            except RuntimeError as error:
                return skipped(str(error))
            speed, highest, share = share_of(bandwidth, call, size, options.seconds)
            name = f"{cell}, {str(dtype).removeprefix('torch.')}"
            lines.append(f"{name}: {speed:.1f} GB/s of {highest:.1f}, {share:.0%} (bar {READ_SHARE:.0%})")
            rows.append({"name": name, "gigabytes": speed, "read_gigabytes": highest, "share": share})
    return Report(lines, {"cells": rows, "bar": READ_SHARE}, all(row["share"] >= READ_SHARE for row in rows))


REPORTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "share of the multiply-add peak, fp32 inference": fma_share,
    "torch.compile": compiled,
    "decoding": decoding,
}

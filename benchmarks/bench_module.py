"""`MultiHeadAttention` against `torch.nn.MultiheadAttention`, called with the same arguments.

In inference torch's own time is the better of its fast path and its general path. Run it by
`python benchmarks/run.py module`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch

import busy_host
import module_memory
import module_peers
import module_reports
from fused_mha.backends.cpu import LIBRARY
from module_cases import module_case
from module_cells import MAIN, QUICK, QUICK_SMALL, QUICK_TOKENS, SMALL, TOKENS, Cell, Mode

from run import BenchCase, GroupBar

BAR = 0.95  # no cell may be slower than torch, but for what two equal contenders differ by
DROPOUT = 0.1


class Call(NamedTuple):
    """One way of calling the module: of a group of cells, with the bars of their geometric mean and of each."""

    group: str
    bar: GroupBar
    mode: Mode
    name: str = ""  # where a group has several
    lowest: float = BAR
    cells: tuple[Cell, ...] = MAIN
    quick: tuple[Cell, ...] = QUICK


MASKS = "fp32 inference, masks"
MASKS_BAR = GroupBar(2.3, 3.5)
TOKEN, TOKEN_STEP = "one token", "one token, training step"
TOKEN_BAR, TOKEN_STEP_BAR = GroupBar(1.0, 1.5), GroupBar(1.0, 1.3)
BF16, FP16 = torch.bfloat16, torch.float16
CALLS = (
    Call("fp32 inference", GroupBar(2.2, 2.6), Mode(), lowest=1.5),
    Call("fp32 inference, weights", GroupBar(2.7, 3.5), Mode(weights=True)),
    Call(MASKS, MASKS_BAR, Mode(padding=True), "padding"),
    Call(MASKS, MASKS_BAR, Mode(causal=True), "causal"),
    Call(MASKS, MASKS_BAR, Mode(causal=True, padding=True), "causal and padding"),
    Call("fp32 training step", GroupBar(1.8, 2.3), Mode(training=True)),
    Call("fp32 training step, weights", GroupBar(2.5, 4.0), Mode(training=True, weights=True)),
    Call("fp32 training step, dropout", GroupBar(3.5, 6.0), Mode(training=True, dropout=DROPOUT)),
    Call("bf16 inference", GroupBar(1.5, 1.7), Mode(BF16)),
    Call("bf16 inference, weights", GroupBar(2.0, 2.5), Mode(BF16, weights=True)),
    Call("bf16 training step", GroupBar(1.3, 2.0), Mode(BF16, training=True)),
    Call("fp16 inference", GroupBar(5.0, 9.0), Mode(FP16)),
    Call("autocast inference", GroupBar(1.0, 1.5), Mode(autocast=True)),
    Call("small, inference", GroupBar(1.5, 2.5), Mode(), cells=SMALL, quick=QUICK_SMALL),
    Call("small, training step", GroupBar(1.2, 1.8), Mode(training=True), cells=SMALL, quick=QUICK_SMALL),
    Call(TOKEN, TOKEN_BAR, Mode(), "fp32", cells=TOKENS, quick=QUICK_TOKENS),
    Call(TOKEN, TOKEN_BAR, Mode(BF16), "bf16", cells=TOKENS, quick=QUICK_TOKENS),
    Call(TOKEN, TOKEN_BAR, Mode(autocast=True), "autocast", cells=TOKENS, quick=QUICK_TOKENS),
    Call(TOKEN_STEP, TOKEN_STEP_BAR, Mode(training=True), "fp32", cells=TOKENS, quick=QUICK_TOKENS),
    Call(TOKEN_STEP, TOKEN_STEP_BAR, Mode(BF16, training=True), "bf16", cells=TOKENS, quick=QUICK_TOKENS),
    Call("fp32 inference, AVX2", GroupBar(1.0, 1.3), Mode(isa="avx2"), lowest=1.0),
)
GROUPS = {call.group: call.bar for call in CALLS}
REPORTS = {**module_reports.REPORTS, **busy_host.REPORTS, **module_peers.REPORTS, **module_memory.REPORTS}


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every call at every size, as far as this machine has its instruction set."""
    for call in CALLS:
        isa = call.mode.isa
        if isa is None or (LIBRARY is not None and isa in LIBRARY.available_isas):
            for cell in call.quick if options.quick else call.cells:
                name = f"{cell}, {call.name}" if call.name else str(cell)
                yield module_case(call.group, name, cell, call.mode, call.lowest)

"""`MultiHeadAttention` against `torch.nn.MultiheadAttention`, called with the same arguments.

In inference torch's own time is the better of its fast path and its general path. Run it by
`python benchmarks/run.py module`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

import module_memory
import module_peers
import module_reports
from attention_cells import forced_isa
from fused_mha.backends.cpu import LIBRARY
from fused_mha.testing import assert_parity
from module_cells import (
    MAIN,
    QUICK,
    QUICK_SMALL,
    SMALL,
    Cell,
    Mode,
    Run,
    arguments,
    autocast,
    general_path,
    inference,
    inputs,
    modules,
    training_step,
)

from run import BenchCase, Contender, GroupBar

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
    Call("fp32 inference, AVX2", GroupBar(1.0, 1.3), Mode(isa="avx2"), lowest=1.0),
)
GROUPS = {call.group: call.bar for call in CALLS}
REPORTS = {**module_reports.REPORTS, **module_peers.REPORTS, **module_memory.REPORTS}


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every call at every size, as far as this machine has its instruction set."""
    for call in CALLS:
        isa = call.mode.isa
        if isa is None or (LIBRARY is not None and isa in LIBRARY.available_isas):
            for cell in call.quick if options.quick else call.cells:
                yield _case(call, cell)


def _case(call: Call, cell: Cell) -> BenchCase:
    ours, theirs = modules(cell, call.mode)
    if call.mode.training:
        mine = training_step(ours, cell, call.mode)
        baselines: dict[str, Contender] = {"torch": training_step(theirs, cell, call.mode)}
    else:
        mine = inference(ours, cell, call.mode)
        fast = inference(theirs, cell, call.mode)
        baselines = {"torch": fast, "torch general": general_path(fast)}
    return BenchCase(
        call.group,
        f"{cell}, {call.name}" if call.name else str(cell),
        mine,
        baselines,
        call.lowest,
        lambda: _verify(mine, cell, call.mode),
        functools.partial(forced_isa, call.mode.isa),
    )


def _verify(run: Run, cell: Cell, mode: Mode) -> None:
    """Raise AssertionError where a result is further from one of higher precision than torch's own may be.

    What the core drops, torch does not: with dropout, all but that is verified, and that one seed gives one result.
    The core's own dropout is verified by `bench_attention`.
    """
    _verify_without_dropout(cell, mode._replace(dropout=0.0))
    if mode.dropout > 0.0:
        first, second, other = (_seeded(run, seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, first, second)), f"{cell}: two training steps after one seed differ"
        assert not torch.equal(first[0], other[0]), f"{cell}: outputs after two seeds agree"


@functools.cache  # two groups may differ in dropout alone
def _verify_without_dropout(cell: Cell, mode: Mode) -> None:
    ours, theirs = modules(cell, mode)
    with torch.set_grad_enabled(mode.training), autocast(mode):
        assert_parity(ours, theirs, *inputs(cell, mode.dtype), **arguments(cell, mode))


def _seeded(run: Run, seed: int) -> tuple[torch.Tensor, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run()

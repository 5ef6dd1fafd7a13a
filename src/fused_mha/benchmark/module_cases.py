"""Calls of the module as cases of the harness, verified: the suites and `benchmarks/` measure them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fused_mha.benchmark.attention_cells import forced_isa, has_isa
from fused_mha.benchmark.harness import BAR, DROPOUT, BenchCase, Contender, GroupBar, seeded
from fused_mha.benchmark.module_cells import (
    MAIN,
    QUICK,
    QUICK_SMALL,
    QUICK_TOKENS,
    SMALL,
    TOKENS,
    Cell,
    Mode,
    ModuleCall,
    Run,
    arguments,
    autocast,
    general_path,
    inputs,
    modules,
)
from fused_mha.testing import assert_parity

HALF = 0.5  # of the keys are hidden


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
    Call(MASKS, MASKS_BAR, Mode(padding=HALF), "padding"),
    Call(MASKS, MASKS_BAR, Mode(causal=True), "causal"),
    Call(MASKS, MASKS_BAR, Mode(causal=True, padding=HALF), "causal and padding"),
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


def module_cases(calls: Iterable[Call] = CALLS, *, quick: bool = False) -> Iterator[BenchCase]:
    """Every call at every size, a small one with ``quick``, as far as this machine has its instruction set."""
    for call in calls:
        if has_isa(call.mode.isa):
            for cell in call.quick if quick else call.cells:
                name = f"{cell}, {call.name}" if call.name else str(cell)
                yield module_case(call.group, name, cell, call.mode, call.lowest)


def module_case(group: str, name: str, cell: Cell, mode: Mode, bar: float) -> BenchCase:
    """A call of our module against the same of torch's, by the better of torch's two paths in inference."""
    ours, theirs = modules(cell, mode)
    call = ModuleCall(cell, mode)
    mine, theirs_by_default = call.of(ours), call.of(theirs)
    baselines: dict[str, Contender] = {"torch": theirs_by_default}
    if not mode.training:
        baselines["torch general"] = general_path(theirs_by_default)
    verify = functools.partial(_verify, mine, cell, mode)
    setup = functools.partial(forced_isa, mode.isa)
    flops = cell.flops if mode == Mode() else 0
    return BenchCase(group, name, mine, baselines, bar, verify, setup, call=call, flops=flops)


def _verify(run: Run, cell: Cell, mode: Mode) -> None:
    """Raise AssertionError where a result is further from one of higher precision than torch's own may be.

    What the core drops, torch does not: with dropout, all but that is verified, and that one seed gives one result.
    The core's own dropout is verified by `attention_cases`.
    """
    _verify_without_dropout(cell, mode._replace(dropout=0.0))
    if mode.dropout > 0.0:
        first, second, other = (seeded(run, seed) for seed in (0, 0, 1))
        assert all(map(torch.equal, first, second)), f"{cell}: two training steps after one seed differ"
        assert not torch.equal(first[0], other[0]), f"{cell}: outputs after two seeds agree"


@functools.cache  # two groups may differ in dropout alone
def _verify_without_dropout(cell: Cell, mode: Mode) -> None:
    ours, theirs = modules(cell, mode)
    with torch.set_grad_enabled(mode.training), autocast(mode):
        assert_parity(ours, theirs, *inputs(cell, mode.dtype, mode.batch_first, mode.device), **arguments(cell, mode))

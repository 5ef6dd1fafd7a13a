"""A call of the module as a case of the harness, verified: `bench_module`, its reports and `bench_random` make them."""

from __future__ import annotations

import functools

import torch

from attention_cells import forced_isa
from fused_mha.testing import assert_parity
from module_cells import (
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

from run import BenchCase, Contender


def module_case(group: str, name: str, cell: Cell, mode: Mode, bar: float) -> BenchCase:
    """A call of our module against the same of torch's, by the better of torch's two paths in inference."""
    ours, theirs = modules(cell, mode)
    if mode.training:
        mine = training_step(ours, cell, mode)
        baselines: dict[str, Contender] = {"torch": training_step(theirs, cell, mode)}
    else:
        mine = inference(ours, cell, mode)
        fast = inference(theirs, cell, mode)
        baselines = {"torch": fast, "torch general": general_path(fast)}
    verify = functools.partial(_verify, mine, cell, mode)
    return BenchCase(group, name, mine, baselines, bar, verify, functools.partial(forced_isa, mode.isa))


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
        assert_parity(ours, theirs, *inputs(cell, mode.dtype, mode.batch_first, mode.device), **arguments(cell, mode))


def _seeded(run: Run, seed: int) -> tuple[torch.Tensor, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run()

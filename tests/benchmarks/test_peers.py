"""Other runtimes are compared turn by turn, and what fails in a runtime's process fails the report."""

import argparse
import functools

import pytest

from fused_mha.benchmark.harness import GroupBar
from peers import compared, in_turns

BAR = GroupBar(1.0, 1.1)


def test_a_ratio_is_the_median_over_turns_with_its_spread():
    """The machine is twice as slow in the last turn: a ratio of medians over all turns would not see the same."""
    turns = [{"ours": 1.0, "fast": 1.2, "slow": 9.0}, {"ours": 1.0, "fast": 1.4, "slow": 9.0}]
    turns.append({"ours": 4.0, "fast": 4.0, "slow": 1.0})
    report = compared([turns], ["a cell"], BAR)
    assert report.passes
    assert report.lines[0] == "a cell: 1.20x [1.08-1.32] in 3 turns  ms: ours 1.000  fast 1.400  slow 9.000"
    assert report.values["geometric_mean"] == pytest.approx(1.2)


def test_a_slower_mean_misses_the_bar():
    assert compared([[{"ours": 2.0, "other": 1.0}] * 2], ["a cell"], BAR).passes is False


def test_an_error_in_a_process_of_its_own_fails_the_report():
    options = argparse.Namespace(seconds=0.1, quick=True, threads=1, seed=0)
    with pytest.raises(ValueError, match=r"invalid literal for int.*: 'wrong'"):
        in_turns({"ours": functools.partial(int, "wrong")}, ["a cell"], BAR, options)

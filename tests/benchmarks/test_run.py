"""The harness: what is wrong is not timed, what is beside has no part in the ratio, and results are on disk at once."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest

from fused_mha.benchmark import comparison
from fused_mha.benchmark.harness import BenchCase

import run

OPTIONS = {"seconds": 0.0, "threads": 1, "only": "", "no_bars": True}


def nothing():
    """A contender."""


def wrong():
    raise AssertionError("it is off")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs cases as a benchmark named "test": the JSON that is left."""

    def measure(cases, fails=None):
        bench = SimpleNamespace(cases=lambda options: cases)
        monkeypatch.setitem(sys.modules, "bench_test", bench)
        monkeypatch.setattr(run, "plot", lambda *_: None)
        options = argparse.Namespace(**OPTIONS, out=tmp_path)
        if fails is not None:
            with pytest.raises(fails):
                run._run("test", "test", options)
        else:
            run._run("test", "test", options)
        return json.loads((tmp_path / "test.json").read_text())

    return measure


def case(name, verify=nothing, **beside):
    return BenchCase("group", name, nothing, {"torch": lambda: sum(range(10_000))}, 0.0, verify, beside=beside)


def test_what_is_wrong_is_named_and_not_timed(measured):
    result = measured([case("a"), case("b", wrong)])
    assert [row["name"] for row in result["rows"]] == ["a"]
    assert result["wrong"] == ["group, b"]
    assert [group["name"] for group in result["groups"]] == ["group"]


def test_what_is_beside_is_timed_and_has_no_part_in_the_ratio(measured):
    (row,) = measured([case("a", faster_than_torch=nothing)])["rows"]
    assert list(row["timings"]) == ["ours", "torch", "faster_than_torch"]
    assert row["ratio"] > 2.0


def test_the_results_are_in_the_format_that_the_command_compares(measured, tmp_path):
    result = measured([case("a")])
    earlier = comparison.read(tmp_path / "test.json")
    assert earlier.ours["group", "a"]._asdict() == result["rows"][0]["timings"]["ours"]
    assert set(comparison.CONDITIONS) <= earlier.head.keys()


def test_a_run_that_is_stopped_leaves_what_it_has_measured(measured):
    def stop():
        raise KeyboardInterrupt

    result = measured([case("a"), case("b", stop)], fails=KeyboardInterrupt)
    assert [row["name"] for row in result["rows"]] == ["a"]

"""Random calls are drawn as their seed says, named by a text that repeats them, and reported only if they are right."""

import argparse
import random

import pytest
import torch

import bench_random
import random_calls
from bench_random import Measured, Wrong, measured_call, summary
from fused_mha.benchmark.harness import Row, Timing
from fused_mha.benchmark.module_cells import Cell, Mode, arguments, inputs, modules
from random_calls import RandomCall, draw, parse


def drawn(seed: int, count: int = 400) -> list[RandomCall]:
    generator = random.Random(seed)
    return [draw(generator) for _ in range(count)]


CALL = RandomCall(Cell(2, 3, 5, 16, 1), Mode(weights=True))
OPTIONS = argparse.Namespace(seed=3, threads=2, only="", quick=False, calls=None, seconds=1.0)


def row(ratio: float, call: RandomCall = CALL) -> Row:
    timing = Timing(1.0, 0.9, 1.1)
    return Row("random calls", str(call), {"ours": timing, "torch": timing}, ratio, 1.0)


def test_one_seed_draws_the_same_calls_and_another_seed_others():
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_little_work_is_drawn_too_whatever_the_seed():
    for seed in range(100):
        assert draw(random.Random(seed), random_calls.QUICK_WORK).work <= random_calls.QUICK_WORK


def test_calls_are_within_their_bounds_and_of_every_kind():
    calls = drawn(0)
    for cell, _ in calls:
        assert 1 <= cell.N <= 256
        assert 1 <= cell.L <= 2048
        assert 1 <= cell.S <= 2048
        assert cell.E % cell.H == 0
    assert all(call.work <= random_calls.WORK for call in calls)
    words = {word for call in calls for word in str(call).split()[1:]}
    tables = (random_calls.DTYPES, random_calls.STEPS, random_calls.MASKS, random_calls.WEIGHTS, random_calls.LAYOUTS)
    assert words == {word for table in tables for word in table} - {""}
    assert {call.cell.is_self_attention for call in calls} == {True, False}
    assert any(max(call.cell.L, call.cell.S) > 1000 for call in calls)
    assert any(call.cell.L == 1 < call.cell.S for call in calls)
    assert any(call.cell.S == 1 < call.cell.L for call in calls)
    assert max(call.cell.N for call in calls) > 200
    assert {call.cell.E for call in calls} == {E for E, _ in random_calls.EMBEDDINGS}


def test_the_text_of_a_call_names_it():
    for call in drawn(5):
        assert parse(str(call)) == call
    text = "2x100->850x256x8 bf16 training causal-padding weights-per-head sequence-first"
    assert parse(text) == RandomCall(
        Cell(2, 100, 850, 256, 8),
        Mode(
            torch.bfloat16,
            training=True,
            weights=True,
            per_head=True,
            padding=0.5,
            causal=True,
            batch_first=False,
        ),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a call starts with its sizes, such as 2x100->850x256x8 .*; got ''"),
        ("2x3x4 fp32 inference", "got '2x3x4'"),
        ("2x3x16x1 fp33 inference", "expected one of fp32, bf16, fp16; got fp33"),
        ("2x3x16x1 fp32", "expected one of inference, training; got nothing"),
        ("2x3x16x1 fp32 inference weights causal", "'causal' is no word of a call, stands twice or in the wrong place"),
    ],
)
def test_a_text_that_names_no_call_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_only_with_a_call_measures_that_call_alone():
    (case,) = bench_random.cases(argparse.Namespace(only=str(CALL)))
    assert str(CALL) in f"{case.group}, {case.name}"  # by which `run` chooses
    assert list(bench_random.cases(argparse.Namespace(only=""))) == []
    assert list(bench_random.cases(argparse.Namespace(only="random"))) == []
    with pytest.raises(SystemExit, match="random: a call starts with its sizes"):
        list(bench_random.cases(argparse.Namespace(only="module")))


@pytest.mark.parametrize("mask", random_calls.MASKS)
@pytest.mark.parametrize("sizes", [(2, 3, 5), (1, 4, 1), (3, 1, 1)], ids=str)
def test_no_mask_hides_every_key_of_a_row(mask, sizes):
    """There torch gives NaN, and nothing could be compared."""
    cell, mode = Cell(*sizes, 16, 2), random_calls.MASKS[mask]
    output, _ = modules(cell, mode).theirs.train()(*inputs(cell), **arguments(cell, mode))
    assert output.isfinite().all()


@pytest.mark.parametrize("call", [call for call in drawn(8, 200) if call.work < 1_000_000], ids=str)
def test_what_is_drawn_can_be_called_and_agrees(call):
    bench_random._case(call).verify()


def test_a_call_whose_result_is_wrong_is_not_timed_and_has_no_ratio(monkeypatch):
    def wrong_modules(cell, mode):
        pair = modules(cell, mode)
        with torch.no_grad():
            forward = pair.ours.forward
            pair.ours.forward = lambda *given, **options: (forward(*given, **options)[0] * 1.001, None)
        return pair

    from fused_mha.benchmark import module_cases

    module_cases._verify_without_dropout.cache_clear()
    monkeypatch.setattr(module_cases, "modules", wrong_modules)
    monkeypatch.setattr(bench_random, "measure", lambda *_: pytest.fail("it was timed"))
    call = RandomCall(Cell(2, 3, 3, 16, 1), Mode())
    result = measured_call(call)
    assert isinstance(result, Wrong)
    assert "AssertionError" in result.problem
    assert "output: largest error" in result.problem

    report = summary([Measured(CALL, 2.0, row(2.0))], [result], OPTIONS)
    assert report.passes is False
    assert not report.is_right
    assert "geometric mean 2.00x" in "\n".join(report.lines)  # of the right one alone
    assert [line for line in report.lines if str(call) in line] == [
        f'WRONG, without a ratio: python benchmarks/run.py random --threads 2 --only "{call}"\n    {result.problem}'
    ]


def test_only_wrong_calls_give_a_report_without_ratios():
    report = summary([], [Wrong(CALL, "RuntimeError: no")], OPTIONS)
    assert report.passes is False
    assert not report.is_right
    assert "geometric_mean" not in report.values


def test_what_comes_out_slower_is_timed_once_more(monkeypatch):
    ratios, seconds = iter([0.8, 1.3, 1.2]), []

    def measure(case, for_seconds):
        case.ours()
        seconds.append(for_seconds)
        return row(next(ratios))

    monkeypatch.setattr(bench_random, "measure", measure)
    slower, faster = measured_call(CALL), measured_call(CALL)
    assert isinstance(slower, Measured)
    assert isinstance(faster, Measured)
    assert (slower.at_first, slower.row.ratio) == (0.8, 1.3)
    assert (faster.at_first, faster.row.ratio) == (1.2, 1.2)
    assert seconds == [bench_random.SECONDS, bench_random.SECONDS_REPEATED, bench_random.SECONDS]


def test_the_summary_counts_what_stays_slower_and_names_the_slowest_first():
    calls = drawn(0, 4)
    at_first = (0.7, 0.85, 2.0, 4.0)
    finally_ = (1.0, 0.8, 2.0, 4.0)
    measured = [Measured(call, a, row(b, call)) for call, a, b in zip(calls, at_first, finally_, strict=True)]
    report = summary(measured, [], OPTIONS)
    text = "\n".join(report.lines)
    assert "4 calls, seed 3, 2 threads" in text
    assert f"geometric mean {(1.0 * 0.8 * 2.0 * 4.0) ** 0.25:.2f}x" in text
    assert "slower than torch: 25.0%, at first 50.0%" in text
    assert "below 0.90x: 25.0%, at first 50.0%" in text
    slowest = report.lines[report.lines.index("the slowest:") + 1]
    assert slowest.startswith(f'0.80x  python benchmarks/run.py random --threads 2 --only "{calls[1]}"')
    assert report.passes is False
    assert report.is_right


@pytest.mark.parametrize(("ratios", "passes"), [([1.9] * 100, True), ([1.9] * 98 + [0.95] * 2, False), ([1.7], False)])
def test_the_bars_are_the_mean_and_the_share_that_is_slower(ratios, passes):
    measured = [Measured(CALL, ratio, row(ratio)) for ratio in ratios]
    assert summary(measured, [], OPTIONS).passes is passes


def test_as_many_calls_are_drawn_as_are_wanted(monkeypatch):
    monkeypatch.setattr(bench_random, "measured_call", lambda call: Measured(call, 2.0, row(2.0, call)))
    report = bench_random.random_calls(argparse.Namespace(**{**vars(OPTIONS), "calls": 7}))
    calls = report.values["calls"]
    assert isinstance(calls, list)
    assert [one["call"] for one in calls] == [str(call) for call in drawn(3, 7)]

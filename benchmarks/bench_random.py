"""Random calls of the module against torch's: how many are slower, and which.

`python benchmarks/run.py random --seed 1 --seconds 600` draws for ten minutes, with `--calls 1000` that many calls.
What it prints of the slowest repeats one alone, for `--seconds` then.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from fused_mha.benchmark.harness import BenchCase, GroupBar, Report, Row, measure
from fused_mha.benchmark.module_cases import module_case
from fused_mha.benchmark.module_cells import inputs
from random_calls import QUICK_WORK, WORK, RandomCall, draw, parse

TITLE = "random calls"
MEAN = GroupBar(1.8, 2.0)
SLOWER, MUCH_SLOWER = 1.0, 0.9
MOST_SLOWER = 0.01  # the share of calls that may be slower; none may be much slower
SECONDS, SECONDS_REPEATED = 0.15, 1.0  # of a call, and of one that came out slower
QUICK_CALLS = 5
SHOWN = 12


class Measured(NamedTuple):
    """A call whose result is right; ``row`` is of the second time, where the ratio ``at_first`` was below 1."""

    call: RandomCall
    at_first: float
    row: Row


class Wrong(NamedTuple):
    """A call that has no ratio, as its result differs from torch's or there is none."""

    call: RandomCall
    problem: str


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """The one call that --only names."""
    if options.only and options.only not in TITLE:
        try:
            yield _case(parse(options.only))
        except ValueError as error:
            raise SystemExit(f"random: {error}") from error


def random_calls(options: argparse.Namespace) -> Report:
    """Draw, check and time calls."""
    measured, wrong = [], []
    for call in _drawn(options):
        result = measured_call(call)
        if isinstance(result, Wrong):
            tqdm.write(f"WRONG {call}")
            wrong.append(result)
        else:
            tqdm.write(f"{result.row.ratio:.2f}x {call}")
            measured.append(result)
    return summary(measured, wrong, options)


REPORTS = {TITLE: random_calls}


def _drawn(options: argparse.Namespace) -> Iterator[RandomCall]:
    """As many as are wanted, or as come within the time, with a bar of progress."""
    generator = random.Random(options.seed)
    wanted = QUICK_CALLS if options.quick else options.calls
    total, unit = (options.seconds, "s") if wanted is None else (wanted, "call")
    start, count = time.perf_counter(), 0
    with tqdm(desc="draw", total=round(total), unit=unit, disable=not sys.stderr.isatty(), leave=False) as progress:
        while (done := time.perf_counter() - start if wanted is None else count) < total:
            progress.update(int(done) - progress.n)
            yield draw(generator, QUICK_WORK if options.quick else WORK)
            count += 1


def measured_call(call: RandomCall) -> Measured | Wrong:
    """Check a call, then time it; once more, in more turns, if it comes out slower than torch's."""
    try:
        case = _case(call)
        case.verify()
        row = measure(case, SECONDS)
        at_first = row.ratio
        if at_first < SLOWER:
            row = measure(case, SECONDS_REPEATED)
    except Exception as error:  # one broken call must not hide the others
        return Wrong(call, f"{type(error).__name__}: {error}")
    finally:
        inputs.cache_clear()  # no other call has them
    return Measured(call, at_first, row)


def _case(call: RandomCall) -> BenchCase:
    return module_case(TITLE, str(call), call.cell, call.mode, SLOWER)


def summary(measured: Sequence[Measured], wrong: Sequence[Wrong], options: argparse.Namespace) -> Report:
    """The shares that are slower, and lines to paste that repeat the slowest and the wrong."""
    repeat = f"python benchmarks/run.py random --threads {options.threads} --only"
    counts = f"{len(measured) + len(wrong)} calls, seed {options.seed}, {options.threads} threads"
    lines, values = [counts], {"seed": options.seed, "calls": [_as_json(one) for one in measured]}
    values["wrong"] = [{"call": str(call), "problem": problem} for call, problem in wrong]
    for call, problem in wrong:
        lines.append(f'WRONG, without a ratio: {repeat} "{call}"\n    {problem}')
    if not measured:
        return Report(lines, values, passes=False, is_right=not wrong)

    ratios = [one.row.ratio for one in measured]
    mean = statistics.geometric_mean(ratios)
    first = [one.at_first for one in measured]
    slower, much_slower = (_share(ratios, bar) for bar in (SLOWER, MUCH_SLOWER))
    lines += [
        f"geometric mean {mean:.2f}x (at least {MEAN.at_least:.2f}, aim {MEAN.aim:.2f})",
        f"slower than torch: {slower:.1%}, at first {_share(first, SLOWER):.1%} (at most {MOST_SLOWER:.0%}, aim 0%)",
        f"below {MUCH_SLOWER:.2f}x: {much_slower:.1%}, at first {_share(first, MUCH_SLOWER):.1%} (none)",
        "the slowest:",
    ]
    for one in sorted(measured, key=lambda one: one.row.ratio)[:SHOWN]:
        lines.append(f'{one.row.ratio:.2f}x  {repeat} "{one.call}"  ms: {one.row.milliseconds}')
    values |= {"geometric_mean": mean, "slower": slower, "much_slower": much_slower, **MEAN._asdict()}
    passes = not wrong and mean >= MEAN.at_least and slower <= MOST_SLOWER and much_slower == 0.0
    return Report(lines, values, passes, is_right=not wrong)


def _share(ratios: Sequence[float], bar: float) -> float:
    return sum(ratio < bar for ratio in ratios) / len(ratios)


def _as_json(one: Measured) -> dict[str, object]:
    return {
        "call": str(one.call),
        "ratio": round(one.row.ratio, 3),
        "at_first": round(one.at_first, 3),
        "timings": one.row.rounded_timings,
    }

"""The harness: interleaved timing, verification first, rows, groups and JSON.

`python -m fused_mha.benchmark` and the checkout's `benchmarks/run.py` both measure by this.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

import torch

from fused_mha import __version__
from fused_mha.benchmark import processor

FORMAT = 1  # of the JSON; another one is not read
BAR = 0.95  # no cell may be slower than torch, but for what two equal contenders differ by
DROPOUT = 0.1  # where a case has any
MIN_ROUNDS = 5  # the fewest of which a 20th and an 80th percentile are not the extremes
Contender = Callable[[], object]
Results = TypeVar("Results")


class CallAsData(Protocol):
    """What a case calls, so that another process can make it anew: it is pickled."""

    def ours(self) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Our call."""
        ...


class BenchCase(NamedTuple):
    """One row: what is timed, and the bar that torch's time / ours has to reach."""

    group: str
    name: str
    ours: Contender
    baselines: dict[str, Contender]  # the fastest of them counts
    bar: float
    verify: Contender  # raises AssertionError if the results differ
    setup: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext  # around both
    beside: Mapping[str, Contender] = MappingProxyType({})  # timed in the same rounds; no part of the ratio
    call: CallAsData | None = None  # for `peers`; None where none of them has such a call
    flops: int = 0  # of ours, where they are multiply-adds of fp32 on the CPU and all that counts


class GroupBar(NamedTuple):
    """What the geometric mean of a group's ratios has to reach, and what it is to reach one day."""

    at_least: float
    aim: float


class Report(NamedTuple):
    """What a report prints and what it leaves in the JSON; `passes` is None where it has no bar or was skipped."""

    lines: list[str]
    values: dict[str, object]
    passes: bool | None = None
    is_right: bool = True  # False where a wrong result was found and the others were measured nevertheless


def skipped(reason: str) -> Report:
    """The report of what this machine or its packages can't do."""
    return Report([f"skipped: {reason}"], {"skipped": reason})


class Timing(NamedTuple):
    """Milliseconds a call, over all rounds."""

    median: float
    percentile_20: float
    percentile_80: float


class Row(NamedTuple):
    """A measured case; `ratio` is the fastest baseline's time over ours, the median over the rounds."""

    group: str
    name: str
    timings: dict[str, Timing]
    ratio: float
    bar: float

    @property
    def passes(self) -> bool:
        """Whether the ratio reaches the bar."""
        return self.ratio >= self.bar

    @property
    def as_json(self) -> dict[str, object]:
        """The row as the results' file has it."""
        return {**self._asdict(), "timings": self.rounded_timings}

    @property
    def rounded_timings(self) -> dict[str, dict[str, float]]:
        """The timings as JSON, to ten nanoseconds."""
        return {name: {key: round(ms, 5) for key, ms in t._asdict().items()} for name, t in self.timings.items()}

    @property
    def milliseconds(self) -> str:
        """The medians, with the 20th and 80th percentiles."""
        return "  ".join(
            f"{name} {t.median:.3f} [{t.percentile_20:.3f}-{t.percentile_80:.3f}]" for name, t in self.timings.items()
        )

    def __str__(self) -> str:
        mark = "" if self.passes else "MISSED "
        return f"{mark}{self.group}, {self.name}: {self.ratio:.2f}x (bar {self.bar:.2f})  ms: {self.milliseconds}"


class Group(NamedTuple):
    """The ratios of a group's rows in brief; the bars are None where the group has none of its own."""

    name: str
    geometric_mean: float
    lowest: float
    at_least: float | None
    aim: float | None

    @property
    def passes(self) -> bool:
        """Whether the geometric mean reaches the group's bar."""
        return self.at_least is None or self.geometric_mean >= self.at_least

    def __str__(self) -> str:
        bar = "" if self.at_least is None else f" (at least {self.at_least:.2f}, aim {self.aim:.2f})"
        mark = "" if self.passes else "MISSED "
        return f"{mark}{self.name}: geometric mean {self.geometric_mean:.2f}x{bar}, lowest {self.lowest:.2f}x"


def seeded(run: Callable[[], Results], seed: int = 0) -> Results:
    """What a call gives after this seed of torch's, which then goes on as if there had been none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run()


def interleave(
    contenders: Mapping[str, Contender], seconds: float, min_rounds: int = MIN_ROUNDS
) -> list[dict[str, float]]:
    """Milliseconds a call, of every contender in every round: in turns, one after the other, for about ``seconds``."""
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < min_rounds or time.perf_counter() < end:
        turn = {}
        names = list(contenders)
        for name in names if len(rounds) % 2 == 0 else reversed(names):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                contenders[name]()
            _wait_for_gpu()
            turn[name] = (time.perf_counter() - start) / repeats[name] * 1e3
        rounds.append(turn)
    return rounds


def median_ms(call: Contender, seconds: float, min_rounds: int = MIN_ROUNDS) -> float:
    """Milliseconds of a call."""
    return statistics.median(turn["call"] for turn in interleave({"call": call}, seconds, min_rounds))


def _repeats(call: Contender) -> int:
    """How many calls make a turn, which is at least 2 ms; the calls that find out warm up too."""
    shortest = math.inf
    for _ in range(3):
        start = time.perf_counter()
        call()
        _wait_for_gpu()
        shortest = min(shortest, time.perf_counter() - start)
        if shortest > 0.1:  # seconds; it is one in any case
            break
    return max(1, math.ceil(0.002 / shortest))


def _wait_for_gpu() -> None:
    """Whose calls return before they are computed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Wrong(NamedTuple):
    """A case that has no row, since its result is not right or there is none."""

    group: str
    name: str
    problem: str

    def __str__(self) -> str:
        return f"WRONG {self.group}, {self.name}: {self.problem}"


def verified(case: BenchCase, seconds: float) -> Row | Wrong:
    """Check a case and, if it is right, time it: no speed is reported of wrong results."""
    try:
        with case.setup():
            case.verify()
    except (AssertionError, RuntimeError) as error:  # the other cases are measured nevertheless
        return Wrong(case.group, case.name, str(error))
    return measure(case, seconds)


def measure(case: BenchCase, seconds: float) -> Row:
    """Time ours and the baselines in the same rounds."""
    contenders = {"ours": case.ours, **case.baselines, **case.beside}
    with case.setup():
        rounds = interleave(contenders, seconds)
    return row_of(case.group, case.name, case.bar, rounds, list(case.baselines))


def row_of(group: str, name: str, bar: float, rounds: Sequence[Mapping[str, float]], baselines: Sequence[str]) -> Row:
    """What the milliseconds of all contenders in every round come to."""
    timings = {contender: _timing([turn[contender] for turn in rounds]) for contender in rounds[0]}
    fastest = min(baselines, key=lambda baseline: timings[baseline].median)
    ratio = statistics.median(turn[fastest] / turn["ours"] for turn in rounds)
    return Row(group, name, timings, ratio, bar)


def _timing(milliseconds: list[float]) -> Timing:
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(statistics.median(milliseconds), cuts[0], cuts[3])


def groups_of(rows: Sequence[Row], bars: Mapping[str, GroupBar] = MappingProxyType({})) -> list[Group]:
    """The groups of the rows, in their order."""
    groups = []
    for name in dict.fromkeys(row.group for row in rows):
        ratios = [row.ratio for row in rows if row.group == name]
        bar = bars.get(name)
        at_least, aim = (None, None) if bar is None else bar
        groups.append(Group(name, statistics.geometric_mean(ratios), min(ratios), at_least, aim))
    return groups


def environment(benchmark: str, threads: int, seconds: float) -> dict[str, object]:
    """What a figure was measured on, with and how: the head of a file of results."""
    return {
        "format": FORMAT,
        "device": processor.device(benchmark),
        "isa": processor.isa(),
        "threads": threads,
        "torch": torch.__version__,
        "fused_mha": __version__,
        "python": platform.python_version(),
        "seconds_per_case": seconds,
    }


def save(result: Mapping[str, object], path: Path) -> None:
    """Write a file of results."""
    part = path.with_name(f"{path.name}.part")  # so that no run that is stopped leaves half of a file
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)

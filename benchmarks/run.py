"""The benchmark harness: interleaved timing, verification first, a table, JSON and a plot.

`python benchmarks/run.py` runs every `bench_<what>.py` beside it, `python benchmarks/run.py module` one of them. Each
such file has a `cases(options)` that yields `BenchCase`s. It may have `GROUPS`, the bars of the groups' geometric
means, and `REPORTS`, named functions of the options that give a `Report` of what is no ratio to torch's time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from tqdm import tqdm

import fused_mha
import processor

HERE = Path(__file__).resolve().parent
MIN_ROUNDS = 5  # the fewest of which a 20th and an 80th percentile are not the extremes
Contender = Callable[[], object]


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


def measure(case: BenchCase, seconds: float) -> Row:
    """Time ours and the baselines in the same rounds."""
    contenders = {"ours": case.ours, **case.baselines, **case.beside}
    with case.setup():
        rounds = interleave(contenders, seconds)
    timings = {name: _timing([turn[name] for turn in rounds]) for name in contenders}
    fastest = min(case.baselines, key=lambda name: timings[name].median)
    ratio = statistics.median(turn[fastest] / turn["ours"] for turn in rounds)
    return Row(case.group, case.name, timings, ratio, case.bar)


def _timing(milliseconds: list[float]) -> Timing:
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(statistics.median(milliseconds), cuts[0], cuts[3])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run benchmarks by name; the exit status is 1 if a result is wrong or a bar is missed."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)} (default: all but random, if they can run)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case; of all random calls (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the random calls (default: 0)")
    parser.add_argument("--calls", type=int, metavar="N", help="draw N random calls, however long they take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases and reports whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that it runs")
    parser.add_argument("--no-bars", action="store_true", help="exit with 0 also where a bar is missed")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of JSON and plots (default: results/<processor> if all cases run, else out/benchmarks)",
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in known:
            parser.error(f"no benchmark {name!r}; there are {', '.join(known)}")
    default_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    possible = [name for name in known if name != "random" and (name != "cuda" or torch.cuda.is_available())]
    statuses = []
    for name in options.names or possible:
        stem = f"{name}_seed_{options.seed}" if name == "random" else name
        if options.threads != default_threads:
            stem += f"_{options.threads}_threads"
        # A part of the cases must not take the place of all.
        folder = Path("out/benchmarks") if options.only or options.quick else HERE / "results" / processor.folder(name)
        run_options = argparse.Namespace(**{**vars(options), "out": options.out or folder})
        statuses.append(_run(name, stem, run_options))
    return max(statuses)


def _run(name: str, stem: str, options: argparse.Namespace) -> int:
    module = importlib.import_module(f"bench_{name}")
    cases = [case for case in module.cases(options) if options.only in f"{case.group}, {case.name}"]
    bars: dict[str, GroupBar] = getattr(module, "GROUPS", {})
    reports = {title: report for title, report in getattr(module, "REPORTS", {}).items() if options.only in title}
    if not cases and not reports:
        print(f"{name}: no case's or report's name contains {options.only!r}", file=sys.stderr)
        return 2
    print(f"{name}: {_environment(name, options)['device']}, {options.threads} threads, torch {torch.__version__}")
    options.out.mkdir(parents=True, exist_ok=True)
    result = {
        **_environment(name, options),
        "rows": [],
        "groups": [],
        "wrong": [],
        "reports": [],
    }
    rows = []
    for case in tqdm(cases, desc=name, disable=not sys.stderr.isatty(), leave=False):
        if _is_wrong(case):  # no speed is reported of wrong results
            result["wrong"].append(f"{case.group}, {case.name}")
        else:
            rows.append(row := measure(case, options.seconds))
            tqdm.write(str(row))
            result["rows"].append({**row._asdict(), "timings": row.rounded_timings})
        _save(result, options.out / f"{stem}.json")  # now already: the run may be stopped, or a report may fail
    groups = _groups(rows, bars)
    result["groups"] = [group._asdict() for group in groups]
    _save(result, options.out / f"{stem}.json")
    for group in groups:
        print(_group_line(group))
    if absent := [] if options.only else [group for group in bars if group not in {row.group for row in rows}]:
        print(f"not possible on this machine: {'; '.join(absent)}")
    missed = [row for row in rows if not row.passes]
    if rows:
        print(f"{len(rows) - len(missed)} of {len(rows)} cases reach their bar")
    if result["wrong"]:
        print("wrong results:", *result["wrong"], sep="\n  ")
    if rows:
        _plot(rows, groups, options.out / f"{stem}.png", f"{name}, {result['device']}, {options.threads} threads")
    is_right = not result["wrong"]
    fails = bool(missed) or not all(group.passes for group in groups)
    for title, measure_report in reports.items():
        report: Report = measure_report(options)
        print(f"{'MISSED ' if report.passes is False else ''}{title}", *report.lines, sep="\n  ")
        result["reports"].append({"name": title, "passes": report.passes, **report.values})
        fails = fails or report.passes is False
        is_right = is_right and report.is_right
        _save(result, options.out / f"{stem}.json")
    return 0 if is_right and (options.no_bars or not fails) else 1


def _is_wrong(case: BenchCase) -> bool:
    """Whether the case cannot be verified; prints why."""
    try:
        with case.setup():
            case.verify()
    except (AssertionError, RuntimeError) as error:  # the other cases are measured nevertheless
        tqdm.write(f"WRONG {case.group}, {case.name}: {error}")
        return True
    return False


def _save(result: Mapping[str, object], path: Path) -> None:
    part = path.with_suffix(".part")  # so that no run that is stopped leaves half of a file
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def _groups(rows: Sequence[Row], bars: Mapping[str, GroupBar]) -> list[Group]:
    groups = []
    for name in dict.fromkeys(row.group for row in rows):
        ratios = [row.ratio for row in rows if row.group == name]
        bar = bars.get(name)
        at_least, aim = (None, None) if bar is None else bar
        groups.append(Group(name, statistics.geometric_mean(ratios), min(ratios), at_least, aim))
    return groups


def _group_line(group: Group) -> str:
    bar = "" if group.at_least is None else f" (at least {group.at_least:.2f}, aim {group.aim:.2f})"
    mark = "" if group.passes else "MISSED "
    return f"{mark}{group.name}: geometric mean {group.geometric_mean:.2f}x{bar}, lowest {group.lowest:.2f}x"


def _environment(name: str, options: argparse.Namespace) -> dict[str, object]:
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no Git, or no repository
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "device": processor.device(name),
        "isa": processor.isa(),
        "threads": options.threads,
        "torch": torch.__version__,
        "fused_mha": fused_mha.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "seconds_per_case": options.seconds,
    }


def _plot(rows: Iterable[Row], groups: Iterable[Group], path: Path, title: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    import matplotlib as mpl  # noqa: PLC0415  a bench extra that the table does without

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = list(rows)[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    colours = ["#2a7f62" if row.passes else "#b8442f" for row in rows]
    axes.barh([f"{row.group}, {row.name}" for row in rows], [row.ratio for row in rows], color=colours)
    axes.plot([row.bar for row in rows], range(len(rows)), "|", color="black", markersize=9, label="bar of the case")
    bars, first, last = [], [], []
    for group in groups:
        if group.at_least is not None:
            places = [place for place, row in enumerate(rows) if row.group == group.name]
            bars.append(group.at_least)
            first.append(places[0] - 0.5)
            last.append(places[-1] + 0.5)
    if bars:
        axes.vlines(bars, first, last, color="#3b5b92", linestyle="--", label="bar of the group's geometric mean")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("torch's time / ours (longer is better)")
    axes.set_title(title)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

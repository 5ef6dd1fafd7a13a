"""The benchmark harness: interleaved timing, verification first, a table, JSON and a plot.

`python benchmarks/run.py` runs every `bench_<what>.py` beside it, `python benchmarks/run.py module` one of them. Each
such file has a `cases(options)` that yields `BenchCase`s.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import fused_mha

HERE = Path(__file__).resolve().parent
Contender = Callable[[], object]


class BenchCase(NamedTuple):
    """One row: what is timed, and the bar that torch's time / ours has to reach."""

    group: str
    name: str
    ours: Contender
    baselines: dict[str, Contender]  # the fastest of them counts
    bar: float
    verify: Contender  # raises AssertionError if the results differ


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


def measure(case: BenchCase, seconds: float) -> Row:
    """Time ours and the baselines in turns, one after the other in every round, for about ``seconds``."""
    contenders = {"ours": case.ours, **case.baselines}
    repeats = {}
    for name, call in contenders.items():
        shortest = math.inf
        for _ in range(3):
            start = time.perf_counter()
            call()
            shortest = min(shortest, time.perf_counter() - start)
        repeats[name] = max(1, math.ceil(0.002 / shortest))  # a turn is at least 2 ms
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 7 or time.perf_counter() < end:
        turn = {}
        names = list(contenders)
        for name in names if len(rounds) % 2 == 0 else reversed(names):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                contenders[name]()
            turn[name] = (time.perf_counter() - start) / repeats[name] * 1e3
        rounds.append(turn)
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
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose group or name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see that it runs")
    parser.add_argument("--no-bars", action="store_true", help="exit with 0 also where a bar is missed")
    parser.add_argument(
        "--out", type=Path, help="folder of JSON and plots (default: results/ if all cases run, else out/benchmarks)"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in known:
            parser.error(f"no benchmark {name!r}; there are {', '.join(known)}")
    if options.out is None:  # a part of the cases must not take the place of all
        options.out = Path("out/benchmarks") if options.only or options.quick else HERE / "results"
    torch.set_num_threads(options.threads)
    return max(_run(name, options) for name in options.names or known)


def _run(name: str, options: argparse.Namespace) -> int:
    module = importlib.import_module(f"bench_{name}")
    cases = [case for case in module.cases(options) if options.only in f"{case.group}, {case.name}"]
    if not cases:
        print(f"{name}: no case's group or name contains {options.only!r}", file=sys.stderr)
        return 2
    for case in tqdm(cases, desc="verify", disable=not sys.stderr.isatty(), leave=False):
        case.verify()  # no speed is reported of wrong results
    print(f"{name}: {_environment(options)['device']}, {options.threads} threads, torch {torch.__version__}")
    rows = []
    for case in tqdm(cases, desc="measure", disable=not sys.stderr.isatty(), leave=False):
        rows.append(measure(case, options.seconds))
        tqdm.write(_line(rows[-1]))
    for group in dict.fromkeys(row.group for row in rows):
        ratios = [row.ratio for row in rows if row.group == group]
        print(f"{group}: geometric mean {statistics.geometric_mean(ratios):.2f}x, lowest {min(ratios):.2f}x")
    missed = [row for row in rows if not row.passes]
    print(f"{len(rows) - len(missed)} of {len(rows)} cases reach their bar")
    options.out.mkdir(parents=True, exist_ok=True)
    result = {**_environment(options), "rows": [{**row._asdict(), "timings": _as_json(row)} for row in rows]}
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    _plot(rows, options.out / f"{name}.png", f"{name}, {result['device']}, {options.threads} threads")
    return 1 if missed and not options.no_bars else 0


def _as_json(row: Row) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 5) for key, value in t._asdict().items()} for name, t in row.timings.items()}


def _line(row: Row) -> str:
    times = "  ".join(
        f"{name} {t.median:.3f} [{t.percentile_20:.3f}-{t.percentile_80:.3f}]" for name, t in row.timings.items()
    )
    return (
        f"{'' if row.passes else 'MISSED '}{row.group}, {row.name}: {row.ratio:.2f}x (bar {row.bar:.2f})  ms: {times}"
    )


def _environment(options: argparse.Namespace) -> dict[str, object]:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "device": _cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "fused_mha": fused_mha.__version__,
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "seconds_per_case": options.seconds,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plot(rows: Iterable[Row], path: Path, title: str) -> None:
    import matplotlib as mpl  # noqa: PLC0415  a bench extra that the table does without

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = list(rows)[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    colours = ["#2a7f62" if row.passes else "#b8442f" for row in rows]
    axes.barh([f"{row.group}, {row.name}" for row in rows], [row.ratio for row in rows], color=colours)
    axes.plot([row.bar for row in rows], range(len(rows)), "|", color="black", markersize=9, label="bar")
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

"""Runs the checkout's benchmarks by the harness of the package: a table, JSON and a plot, against bars.

`python benchmarks/run.py` runs every `bench_<what>.py` beside it, `python benchmarks/run.py module` one of them. Each
such file has a `cases(options)` that yields `BenchCase`s. It may have `GROUPS`, the bars of the groups' geometric
means, and `REPORTS`, named functions of the options that give a `Report` of what is no ratio to torch's time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_mha.benchmark import processor
from fused_mha.benchmark.harness import GroupBar, Report, Wrong, environment, groups_of, save, verified
from fused_mha.benchmark.plot import plot

HERE = Path(__file__).resolve().parent


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
    absent = {"random"}
    absent |= set() if torch.cuda.is_available() else {"cuda"}
    absent |= set() if importlib.util.find_spec("transformers") else {"decoding", "transformers"}
    possible = [name for name in known if name not in absent]
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
    result: dict[str, Any] = {**environment(name, options.threads, options.seconds), "commit": _commit()}
    result |= {"rows": [], "groups": [], "wrong": [], "reports": []}
    heading = f"{name}, {result['device']}, {options.threads} threads"
    print(f"{heading}, torch {torch.__version__}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in tqdm(cases, desc=name, disable=not sys.stderr.isatty(), leave=False):
        row = verified(case, options.seconds)
        tqdm.write(str(row))
        if isinstance(row, Wrong):
            result["wrong"].append(f"{case.group}, {case.name}")
        else:
            rows.append(row)
            result["rows"].append(row.as_json)
        save(result, options.out / f"{stem}.json")  # now already: the run may be stopped, or a report may fail
    groups = groups_of(rows, bars)
    result["groups"] = [group._asdict() for group in groups]
    save(result, options.out / f"{stem}.json")
    for group in groups:
        print(group)
    if absent := [] if options.only else [group for group in bars if group not in {row.group for row in rows}]:
        print(f"not possible on this machine: {'; '.join(absent)}")
    missed = [row for row in rows if not row.passes]
    if rows:
        print(f"{len(rows) - len(missed)} of {len(rows)} cases reach their bar")
    if result["wrong"]:
        print("wrong results:", *result["wrong"], sep="\n  ")
    if rows:
        plot(rows, groups, options.out / f"{stem}.png", heading)
    is_right = not result["wrong"]
    fails = bool(missed) or not all(group.passes for group in groups)
    for title, measure_report in reports.items():
        report: Report = measure_report(options)
        print(f"{'MISSED ' if report.passes is False else ''}{title}", *report.lines, sep="\n  ")
        result["reports"].append({"name": title, "passes": report.passes, **report.values})
        fails = fails or report.passes is False
        is_right = is_right and report.is_right
        save(result, options.out / f"{stem}.json")
    return 0 if is_right and (options.no_bars or not fails) else 1


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no Git, or no repository
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())

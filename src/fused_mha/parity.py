"""`python -m fused_mha.parity`: run a grid of configurations against the installed torch, and say what agreed."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from fused_mha import __version__
from fused_mha.testing import Case, Comparison, compare, grid

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Result(NamedTuple):
    """What came of one case; `error` is the text of an exception."""

    case: Case
    comparisons: list[Comparison]
    seconds: float
    error: str | None = None

    @property
    def problems(self) -> list[str]:
        """What differs, by line."""
        if self.error is not None:
            return [self.error]
        return [str(comparison) for comparison in self.comparisons if not comparison.agrees]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 0 if everything agreed and 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m fused_mha.parity", description=__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="repeatable (default: all)")
    parser.add_argument("--device", default="cpu", help="where both modules run (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, inputs and dropout (default: 0)")
    parser.add_argument("--full", action="store_true", help="a larger grid: products of options, larger shapes")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    options = parser.parse_args(arguments)

    cases = [case._replace(dtype=DTYPES[name]) for name in options.dtype or DTYPES for case in grid(full=options.full)]
    print(
        f"fused_mha {__version__} against torch {torch.__version__} on {options.device}, seed {options.seed}: "
        f"{len(cases)} configurations"
    )
    results = [_run_case(case, options.device, options.seed) for case in _with_progress(cases)]
    print(_table(results))
    failures = [result for result in results if result.problems]
    for result in failures:
        print(f"\nDIFFERS  {result.case}  (seed {options.seed})")
        for problem in result.problems:
            print(f"  {problem}")
    print(f"\n{len(results) - len(failures)} of {len(results)} configurations agree")
    if options.junit is not None:
        _write_junit(options.junit, results)
    return 1 if failures else 0


def _run_case(case: Case, device: str, seed: int) -> Result:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs, inputs, forward_arguments = case.build(device, seed)
            comparisons = compare(ours, theirs, *inputs, seed=seed, **forward_arguments)
            if not case.training:  # torch's fast path, and ours where it may overwrite
                with torch.no_grad():
                    inference = compare(ours, theirs, *inputs, seed=seed, **forward_arguments)
                comparisons += [c._replace(quantity=f"{c.quantity} (no_grad)") for c in inference]
    except Exception as error:  # one broken configuration must not hide the others
        return Result(case, [], time.perf_counter() - start, f"{type(error).__name__}: {error}")
    return Result(case, comparisons, time.perf_counter() - start)


def _with_progress(cases: Sequence[Case]) -> Iterator[Case]:
    if sys.stderr.isatty():
        yield from tqdm(cases, unit="case", leave=False)
        return
    step = max(1, len(cases) // 10)
    for i, case in enumerate(cases):
        if i % step == 0:
            print(f"  {i} of {len(cases)}", flush=True)
        yield case


def _table(results: Iterable[Result]) -> str:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((str(result.case.dtype).removeprefix("torch."), result.case.group), []).append(result)
    lines = [
        f"{'dtype':<9} {'group':<13} {'agree':>9}  {'closest to its tolerance':<34} {'error':>9} {'torch':>9} "
        f"{'tolerance':>9}"
    ]
    for (dtype, group), members in groups.items():
        agreed = sum(not member.problems for member in members)
        line = f"{dtype:<9} {group:<13} {agreed:>4}/{len(members):<4}"
        judged = [c for member in members for c in member.comparisons if c.tolerance > 0.0]
        if judged:
            worst = max(judged, key=lambda c: c.error / c.tolerance)
            line += f"  {worst.quantity:<34} {worst.error:9.1e} {worst.torch_error:9.1e} {worst.tolerance:9.1e}"
        lines.append(line)
    return "\n".join(lines)


def _write_junit(path: Path, results: Sequence[Result]) -> None:
    failures = sum(bool(result.problems) for result in results)
    suite = ET.Element("testsuite", name="fused_mha.parity", tests=str(len(results)), failures=str(failures))
    for result in results:
        element = ET.SubElement(
            suite, "testcase", classname="fused_mha.parity", name=str(result.case), time=f"{result.seconds:.4f}"
        )
        if result.problems:
            failure = ET.SubElement(element, "failure", message=result.problems[0])
            failure.text = "\n".join(result.problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


if __name__ == "__main__":
    sys.exit(main())

"""What came of each comparison, as a table, JUnit XML and JSON; the command and the pytest plugin make and read it."""

from __future__ import annotations

import json
import math
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_mha.testing import Case, Comparison, compare
from fused_mha.testing.cases import name_of


class Result(NamedTuple):
    """What came of one configuration, or of a model in one mode; `error` is the text of an exception."""

    name: str
    group: str
    dtype: str
    comparisons: list[Comparison]
    seconds: float
    error: str | None = None

    @property
    def problems(self) -> list[str]:
        """What differs, by line."""
        if self.error is not None:
            return [self.error]
        return [str(comparison) for comparison in self.comparisons if not comparison.agrees]

    @property
    def as_json(self) -> dict[str, Any]:
        """Numbers that are not finite, which JSON cannot say, as None."""
        return {
            **self._asdict(),
            "agrees": not self.problems,
            "comparisons": [
                {
                    **{name: _finite_or_none(value) for name, value in comparison._asdict().items()},
                    "agrees": comparison.agrees,
                }
                for comparison in self.comparisons
            ],
        }


def run_case(case: Case, device: str, seed: int) -> Result:
    """Compare the two modules of a configuration; one that evaluates, also as `torch.no_grad` serves it."""

    def comparisons() -> list[Comparison]:
        ours, theirs, inputs, arguments = case.build(device, seed)
        found = compare(ours, theirs, *inputs, seed=seed, **arguments)
        if not case.training:  # torch's fast path, and ours where it may overwrite
            with torch.no_grad():
                inference = compare(ours, theirs, *inputs, seed=seed, **arguments)
            found += [c._replace(quantity=f"{c.quantity} (no_grad)") for c in inference]
        return found

    return judged(str(case), case.group, case.dtype, comparisons)


def judged(name: str, group: str, dtype: torch.dtype, comparisons: Callable[[], list[Comparison]]) -> Result:
    """The result of comparisons, or of the exception that they end with: one must not hide the others."""
    start = time.perf_counter()
    found, error = [], None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = comparisons()
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    return Result(name, group, name_of(dtype), found, time.perf_counter() - start, error)


def table(results: Iterable[Result], ours: str = "error", theirs: str = "torch") -> str:
    """The results by dtype and group: how many agree, and which quantity comes closest to its tolerance.

    Args:
        results: in the order of the groups.
        ours: the heading above our errors.
        theirs: the heading above torch's.

    Returns:
        Lines of text.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dtype, result.group), []).append(result)
    worst = {key: _closest_to_its_tolerance(members) for key, members in groups.items()}
    width = max(34, *(len(c.quantity) for c in worst.values() if c is not None))
    lines = [
        f"{'dtype':<9} {'group':<13} {'agree':>9}  {'closest to its tolerance':<{width}} {ours:>9} {theirs:>9} "
        f"{'tolerance':>9}"
    ]
    for (dtype, group), members in groups.items():
        agreed = sum(not member.problems for member in members)
        line = f"{dtype:<9} {group:<13} {agreed:>4}/{len(members):<4}"
        if (c := worst[dtype, group]) is not None:
            line += f"  {c.quantity:<{width}} {c.error:9.1e} {c.torch_error:9.1e} {c.tolerance:9.1e}"
        lines.append(line)
    return "\n".join(lines)


def _closest_to_its_tolerance(results: Iterable[Result]) -> Comparison | None:
    numbers = [c for result in results for c in result.comparisons if c.tolerance > 0.0]
    return max(numbers, key=lambda c: c.error / c.tolerance, default=None)


def write_junit(path: Path, results: Sequence[Result]) -> None:
    """One test case for each result."""
    failures = sum(bool(result.problems) for result in results)
    suite = ET.Element("testsuite", name="fused_mha.parity", tests=str(len(results)), failures=str(failures))
    for result in results:
        element = ET.SubElement(
            suite, "testcase", classname="fused_mha.parity", name=result.name, time=f"{result.seconds:.4f}"
        )
        if result.problems:
            failure = ET.SubElement(element, "failure", message=result.problems[0])
            failure.text = "\n".join(result.problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def write_json(path: Path, head: Mapping[str, Any], results: Sequence[Result]) -> None:
    """``head`` and all results with every comparison, for other programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {**head, "results": [result.as_json for result in results]}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

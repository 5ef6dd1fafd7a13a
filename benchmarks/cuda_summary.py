"""The table that `run_cuda` prints last, of the files that its steps have left; what a step did not leave is named.

`python benchmarks/cuda_summary.py FOLDER` prints it again.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fused_mha.benchmark import processor

COLUMNS = ("cells", "mean", "lowest", "cuDNN", "FlexAttention", "SDPA cleaned")
PEERS = ("cudnn_attention", "flex_attention", "sdpa_cleaned")  # of the last columns
COLLECTED = re.compile(r"\[(\d+) items?\]|collected (\d+) items?")  # with xdist and without
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b +tests/|tests/\S+.* (PASSED|FAILED|ERROR|SKIPPED)\b")


def summary(folder: Path) -> str:
    """The whole table.

    Args:
        folder: where `run_cuda` wrote.

    Returns:
        Its lines.
    """
    results = _json(folder / "cuda.json")
    lines = [f"processor: {processor.cpu_name()}"]
    if results is not None:
        lines[0] += f"; measured on: {results['device']}, torch {results['torch']}, commit {results['commit']}"
    lines.append(f"tests/cuda: {tests(folder / 'cuda_tests.xml', folder / 'cuda_tests.log')}")
    for xml in sorted((folder / "cpu").glob("*.xml")):
        lines.append(f"cpu, {xml.stem}: {tests(xml, xml.with_suffix('.log'))}")
    lines += ["", *(["no benchmark: cuda.json is missing"] if results is None else _groups(results))]
    for path in sorted((folder / "cpu").glob("*.json")):
        of_cpu = _json(path)
        lines += ["", f"cpu, {path.stem}:", *([] if of_cpu is None else _groups(of_cpu))]
    lines += ["", *_host_time(_json(folder / "host_time.json"))]
    return "\n".join(lines)


def tests(xml: Path, log: Path) -> str:
    """How many tests passed and so on; by the log, where the run was stopped before it wrote its XML."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    try:
        suites = list(ET.parse(xml).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        if not lines:
            return "not run"
        found = (OUTCOME.search(line) for line in lines)
        counts = Counter(match[1] or match[2] for match in found if match is not None)
        numbers = [counts[outcome] for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")]
    else:
        of_all = [sum(int(suite.get(kind, 0)) for suite in suites) for kind in ("failures", "errors", "skipped")]
        numbers = [sum(int(suite.get("tests", 0)) for suite in suites) - sum(of_all), *of_all]
    collected = [int(match[1] or match[2]) for line in lines if (match := COLLECTED.search(line)) is not None]
    passed, failed, errors, skipped = numbers
    left = max(0, max(collected, default=0) - sum(numbers))
    return f"{passed} passed, {failed} failed, {errors} errors, {skipped} skipped, {left} not reached"


def _groups(results: Mapping[str, Any]) -> list[str]:
    """One line for each group: its ratios, and the time of peers over ours, as geometric means."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["group"], []).append(row)
    width = max(map(len, rows), default=0)
    lines = [f"{'theirs / ours':<{width}}" + "".join(f"  {title:>13}" for title in COLUMNS)]
    for name, cells in rows.items():
        ratios = [cell["ratio"] for cell in cells]
        peers = [_mean(_times_of(cells, peer)) for peer in PEERS]
        entries = [str(len(cells)), f"{statistics.geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", *peers]
        lines.append(f"{name:<{width}}" + "".join(f"  {entry:>13}" for entry in entries))
    return [*lines, *(f"WRONG {name}" for name in results["wrong"])]


def _times_of(cells: Iterable[Mapping[str, Any]], peer: str) -> list[float]:
    """Of the cells that a peer was timed in, its time over ours."""
    timings = [cell["timings"] for cell in cells if peer in cell["timings"]]
    return [times[peer]["median"] / times["ours"]["median"] for times in timings]


def _mean(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "-"


def _host_time(found: Mapping[str, Mapping[str, list[float]]] | None) -> list[str]:
    if found is None:
        return ["no host time: host_time.json is missing"]
    lines = ["host time of small calls, the lowest, microseconds:"]
    for title, contenders in found.items():
        lines.append(f"  {title}: " + ", ".join(f"{name} {lowest:.1f}" for name, (lowest, _) in contenders.items()))
    return lines


def _json(path: Path) -> Any:
    """What a file holds, or None: it may be missing, or cut short where its writer was stopped."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))

"""An earlier run beside this one: which times differ by more than both runs scatter. `command` prints it.

A time is *faster* or *slower* where the medians differ by more than each run's spread from the 20th to the 80th
percentile; whatever differs less is within noise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_mha.benchmark.harness import FORMAT, Row, Timing

CONDITIONS = ("device", "isa", "threads", "torch", "python")  # which should be the same in both runs
FASTER, SLOWER, NOISE = "faster", "slower", "within noise"


class Earlier(NamedTuple):
    """What an earlier run was made with, and our times by group and name."""

    path: Path
    head: Mapping[str, Any]
    ours: Mapping[tuple[str, str], Timing]


def read(path: Path) -> Earlier:
    """An earlier run's file; raises ValueError, in one sentence, where it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a file that --json wrote; {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"expected a file that --json wrote; {path} is not JSON") from error
    given = result.get("format") if isinstance(result, dict) else None
    if given != FORMAT:
        raise ValueError(f"expected results of format {FORMAT}; {path} has format {given}: measure it again")
    try:
        ours = {(row["group"], row["name"]): _timing(row["timings"]["ours"]) for row in result["rows"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected rows with a group, a name and timings of ours; those of {path} have not") from error
    return Earlier(path, result, ours)


def _timing(entry: Mapping[str, Any]) -> Timing:
    return Timing(*(0.0 + entry[field] for field in Timing._fields))


def verdict(now: Timing, before: Timing) -> str:
    """Whether a time is another one, or within noise."""
    spread = max(timing.percentile_80 - timing.percentile_20 for timing in (now, before))
    if abs(now.median - before.median) <= spread:
        return NOISE
    return FASTER if now.median < before.median else SLOWER


def beside(row: Row, earlier: Earlier) -> str:
    """Our time then over that of now, and its verdict; empty for a case that the earlier run has not."""
    before, now = earlier.ours.get((row.group, row.name)), row.timings["ours"]
    return "" if before is None else f"{before.median / now.median:.2f}x {verdict(now, before)}"


def summary(rows: Sequence[Row], earlier: Earlier, head: Mapping[str, Any]) -> list[str]:
    """How many cases are of which kind, and what the two runs do not have in common."""
    known = [row for row in rows if (row.group, row.name) in earlier.ours]
    counts = Counter(verdict(row.timings["ours"], earlier.ours[row.group, row.name]) for row in known)
    kinds = [f"{counts[kind]} {kind}" for kind in (FASTER, SLOWER, NOISE)]
    lines = [f"against {earlier.path}: {', '.join(kinds)}, {len(rows) - len(known)} not in it"]
    before, now = ({**dict.fromkeys(CONDITIONS), **which, **which.get("peers", {})} for which in (earlier.head, head))
    peers = (name for name in head.get("peers", {}) if name in before)
    for name in (*CONDITIONS, *peers):
        if before[name] != now[name]:
            lines.append(f"not the same conditions: {name} was {before[name]}, is {now[name]}")
    return lines

"""What a run of `command` has found: as a table, as JSON, and as the rows of a plot and a comparison."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fused_mha.benchmark import comparison
from fused_mha.benchmark.harness import BenchCase, Row, Wrong, groups_of
from fused_mha.benchmark.peers import Turns


class Measured(NamedTuple):
    """A case that is right; ``fastest`` is what the ratio is to: the fastest baseline, or a peer."""

    row: Row
    fastest: str
    mib: Mapping[str, float] = MappingProxyType({})  # of ours and of the fastest; of no peer's
    share_of_peak: float | None = None

    @property
    def as_json(self) -> dict[str, object]:
        """The harness's row, and what else was measured."""
        others = {"fastest": self.fastest, "mib": {**self.mib}, "share_of_peak": self.share_of_peak}
        return {**self.row.as_json, **others}


class Outcome:
    """The cases that are right beside torch and beside peers, the wrong ones, and what peers were not given."""

    def __init__(self) -> None:
        """Nothing is found yet."""
        self.beside_torch: list[Measured] = []
        self.beside_peers: list[Measured] = []
        self.wrong: list[Wrong] = []
        self._refused: dict[tuple[str, str], list[str]] = {}  # the cases' groups, by peer and reason

    @property
    def rows(self) -> list[Row]:
        """Those beside torch, then those beside peers."""
        return [one.row for one in (*self.beside_torch, *self.beside_peers)]

    def add_turns(self, case: BenchCase, turns: Turns) -> None:
        """Add what came of peers in a case."""
        self.beside_peers += [Measured(row, name) for name, row in turns.rows(case).items()]
        self.wrong += turns.wrong.values()
        for name, reason in turns.refused.items():
            self._refused.setdefault((name, reason), []).append(case.group)

    def as_json(self, head: Mapping[str, object]) -> dict[str, object]:
        """What --json writes."""
        return {
            **head,
            "rows": [one.as_json for one in (*self.beside_torch, *self.beside_peers)],
            "groups": [group._asdict() for group in groups_of(self.rows)],
            "wrong": [f"{one.group}, {one.name}" for one in self.wrong],
        }

    def table(self, earlier: comparison.Earlier | None) -> list[str]:
        """The cases, then their groups and all of them in brief, the same of peers, and last what is wrong."""
        columns = [["case", "speed-up", "ours, ms", "torch, ms", "of peak", "MiB", "torch's"]]
        for one in self.beside_torch:
            share = "-" if one.share_of_peak is None else f"{one.share_of_peak:.0%}"
            columns.append([*_times(one), share, *(f"{one.mib[name]:.1f}" for name in ("ours", one.fastest))])
        lines = _lines(columns, self.beside_torch, earlier)
        rows = [one.row for one in self.beside_torch]
        counts = Counter(row.group for row in rows)
        lines += [str(group) for group in groups_of(rows) if len(rows) > 1 and counts[group.name] > 1]
        lines += _in_brief("all", rows)
        if self.beside_peers:
            columns = [["case", "speed-up", "ours, ms", "peer's, ms"], *map(_times, self.beside_peers)]
            lines += ["", *_lines(columns, self.beside_peers, earlier)]
        for peer in dict.fromkeys(one.fastest for one in self.beside_peers):
            lines += _in_brief(f"against {peer}", [one.row for one in self.beside_peers if one.fastest == peer])
        for (peer, reason), groups in self._refused.items():
            lines.append(f"no {peer} beside {reason}: {'; '.join(dict.fromkeys(groups))}")
        return [*lines, *map(str, self.wrong)]


def _times(one: Measured) -> list[str]:
    """A case's first columns."""
    row = one.row
    times = (
        f"{timing.median:.3f} [{timing.percentile_20:.3f}-{timing.percentile_80:.3f}]"
        for timing in (row.timings["ours"], row.timings[one.fastest])
    )
    return [f"{row.group}, {row.name}", f"{row.ratio:.2f}x", *times]


def _lines(cells: list[list[str]], of: Sequence[Measured], earlier: comparison.Earlier | None) -> list[str]:
    """The head and the cases, aligned, and beside an earlier run."""
    if earlier is not None:
        beside = (comparison.beside(one.row, earlier) for one in of)
        cells = [[*line, last] for line, last in zip(cells, [f"to {earlier.path.name}", *beside], strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]


def _in_brief(what: str, rows: Sequence[Row]) -> list[str]:
    """A line on more than one row."""
    if len(rows) < 2:
        return []
    lowest = min(rows, key=lambda row: row.ratio)
    mean = statistics.geometric_mean(row.ratio for row in rows)
    return [f"{what}: geometric mean {mean:.2f}x, lowest {lowest.ratio:.2f}x ({lowest.group}, {lowest.name})"]

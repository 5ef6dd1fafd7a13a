"""The plot of ratios: a bar for each case. `python -m fused_mha.benchmark` and `benchmarks/run.py` draw it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from fused_mha.benchmark.harness import Group, Row


def plot(rows: Sequence[Row], groups: Sequence[Group], path: Path, title: str, whose: str = "torch's") -> None:
    """Draw ``whose`` time over ours; without matplotlib, say so."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    import matplotlib as mpl  # noqa: PLC0415  an extra that the table does without

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib import ticker  # noqa: PLC0415

    rows = rows[::-1]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    colours = ["#2a7f62" if row.passes else "#b8442f" for row in rows]
    # Bars start at 1, so that one to the right is faster. On a linear axis a ratio of 100 would flatten all others.
    lengths = [row.ratio - 1.0 for row in rows]
    axes.barh([f"{row.group}, {row.name}" for row in rows], lengths, left=1.0, color=colours)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
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
    axes.set_xlabel(f"{whose} time / ours (longer is better)")
    axes.set_title(title)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    figure.legend(loc="outside lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)

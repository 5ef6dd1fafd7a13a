"""Draws the pictures of the documentation and the README; run it again when results or masks have changed.

    python docs/pictures.py

The speeds are those of `benchmarks/results`. The masks are weights that `fused_mha.attention` returns. The
errors are those of the parity kit, on the processor that runs this. It needs matplotlib, of the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

import fused_mha
from fused_mha.benchmark.module_cells import Cell
from fused_mha.benchmark.suites import GROWING
from fused_mha.testing import Comparison, compare, grid

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
OUT = Path(__file__).parent / "pictures"

FASTER, SLOWER, INK, FAINT, HIDDEN, VIRTUAL = "#2f6f9f", "#c2703d", "#333333", "#d9dde1", "#eef0f2", "#8a6fae"
LIMIT = 12.0  # of the axis: one call of torch's takes 100 times as long
INCHES_A_ROW = 0.24
GROUPS_OF_ERRORS = ("plain", "masks", "causal", "virtual keys")
KEYS, CELL = 8, 0.24  # of a picture of a mask: its real keys, and the inches of a cell
TIMES = "\N{MULTIPLICATION SIGN}"
AXIS = (
    f"torch's time over ours: right of 1{TIMES} is faster than torch\n"
    "dot: geometric mean of the cases; bar: from the lowest to the highest case"
)


class Panel(NamedTuple):
    """The groups of one file of results, each with the label that it gets."""

    title: str
    file: str
    labels: Mapping[str, str]


MODULE = Panel(
    "AMD EPYC (Zen 5, AVX-512), 2 threads: the module",
    "amd_epyc_avx512_bf16/module.json",
    {
        "fp32 inference": "fp32 inference",
        "fp32 inference, weights": "… with weights",
        "fp32 inference, masks": "… with masks",
        "fp32 inference, AVX2": "… by AVX2 alone",
        "fp32 training step": "fp32 training step",
        "fp32 training step, weights": "… with weights",
        "fp32 training step, dropout": "… with dropout",
        "bf16 inference": "bf16 inference",
        "bf16 inference, weights": "… with weights",
        "bf16 training step": "bf16 training step",
        "autocast inference": "autocast to bf16, inference",
        "fp16 inference": "fp16 inference",
        "small, inference": "tiny calls, inference",
        "small, training step": "tiny calls, training step",
    },
)
INTEL = MODULE._replace(title="Intel Xeon (AMX), 2 threads: the module", file="intel_xeon_avx512_amx/module.json")
CORE = Panel(
    "AMD EPYC (Zen 5, AVX-512), 2 threads: the attention core",
    "amd_epyc_avx512_bf16/attention.json",
    {
        "fp32 forward": "fp32 forward",
        "fp32 forward, AVX2": "… by AVX2 alone",
        "bf16 forward": "bf16 forward",
        "fp16 forward": "fp16 forward",
        "forward, averaged weights": "averaged weights",
        "forward, causal and padding": "causal and padding",
        "odd shapes, forward": "odd shapes",
        "one query, forward": "one query",
        "fp32 forward and backward": "fp32 with backward",
        "bf16 forward and backward": "bf16 with backward",
        "dropout, forward and backward": "dropout, with backward",
        "averaged weights, forward and backward": "averaged weights, with backward",
    },
)
CUDA = Panel(
    "NVIDIA H100, bf16 for the most part",
    "nvidia_h100/cuda.json",
    {
        "module, training step": "module, training step",
        "module, inference": "module, inference",
        "small module, training step": "small module, training step",
        "small module, inference": "small module, inference",
        "padding, forward and backward": "padding, with backward",
        "causal and padding, forward and backward": "causal and padding, with backward",
        "causal mask as a tensor, forward and backward": "bool mask, with backward",
        "float mask, forward and backward": "float mask, with backward",
        "dropout, forward and backward": "dropout, with backward",
        "plain and causal, forward": "no mask (torch's kernels), forward",
        "plain and causal, forward and backward": "… with backward",
        "own kernels, forward": "no mask (our kernels, forced), forward",
        "own kernels, forward and backward": "… with backward",
    },
)
GROWTH, GROWTH_MEMORY = "intel_xeon_2_cores/growth.json", "intel_xeon_2_cores/growth_memory.json"
PICTURES = {"speed.png": (MODULE, INTEL, CUDA), "speed_core.png": (CORE,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of the pictures (default: docs/pictures)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 10, "text.color": INK, "axes.edgecolor": FAINT, "ytick.color": INK}):
        for name, panels in PICTURES.items():
            draw_speed(panels, out / name)
        draw_growth(out / "growth.png")
        draw_errors(out / "errors.png")
        for name, weights in masks().items():
            draw_mask(weights, out / f"mask_{name}.png")


def draw_speed(panels: tuple[Panel, ...], path: Path) -> None:
    """Torch's time over ours: for each kind of call the geometric mean and the range of its cases."""
    rows = [len(panel.labels) for panel in panels]
    height = INCHES_A_ROW * sum(rows) + 0.55 * len(panels) + 0.55
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=rows)
    for panel, ax in zip(panels, axes[:, 0], strict=True):
        results = json.loads((RESULTS / panel.file).read_text())
        for i, (group, label) in enumerate(panel.labels.items()):
            draw_group(ax, i, results, group, label)
        ax.set_yticks(range(len(panel.labels)), list(panel.labels.values()))
        ax.set_ylim(len(panel.labels) - 0.4, -0.6)
        ax.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
        ax.axvline(1.0, color=INK, linewidth=0.9, zorder=1)
        ax.set_xscale("log")
        ax.set_xlim(0.55, LIMIT * 1.25)
        ax.xaxis.set_major_locator(FixedLocator([0.7, 1, 1.5, 2, 3, 5, 10]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}{TIMES}"))
        ax.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
        ax.tick_params(length=0)
        ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes[-1, 0].set_xlabel(AXIS)
    figure.savefig(path, dpi=200)


def draw_group(ax: Axes, i: int, results: Mapping[str, Any], group: str, label: str) -> None:
    ratios = [row["ratio"] for row in results["rows"] if row["group"] == group]
    (mean,) = (found["geometric_mean"] for found in results["groups"] if found["name"] == group)
    color = FASTER if mean >= 1.0 else SLOWER
    ax.plot(
        [min(ratios), min(max(ratios), LIMIT)],
        [i, i],
        color=color,
        alpha=0.35,
        linewidth=5,
        solid_capstyle="butt",
        zorder=2,
    )
    ax.plot(mean, i, "o", color=color, markersize=6.5, zorder=3)
    if max(ratios) > LIMIT:
        ax.annotate(
            f"to {max(ratios):.0f}{TIMES}", (LIMIT, i), (3, 0), textcoords="offset points", va="center", fontsize=9
        )
    ax.annotate(
        f"{mean:.2f}", (mean, i), (0, 5.5), textcoords="offset points", ha="center", fontsize=7.5, color=color, zorder=4
    )


def draw_growth(path: Path) -> None:
    """Time and memory of the module against length, each for three kinds of call, and the time that the peak allows."""
    times = json.loads((RESULTS / GROWTH).read_text())["rows"]
    (report,) = json.loads((RESULTS / GROWTH_MEMORY).read_text())["reports"]
    memory = {cell["name"]: cell for cell in report["cells"]}
    peak = statistics.median(
        Cell(*sizes_of(row)).flops / row["timings"]["ours"]["median"] / row["share_of_peak"]
        for row in times
        if row["share_of_peak"] is not None
    )
    figure = Figure(figsize=(8.0, 4.9), layout="constrained")
    axes = figure.subplots(2, len(GROWING), sharex=True, sharey="row")
    for (above, below), (group, mode) in zip(axes.T, GROWING.items(), strict=True):
        rows = [row for row in times if row["group"] == group]
        cells = [Cell(*sizes_of(row)) for row in rows]
        lengths = [cell.L for cell in cells]
        for whose, color, side in (("torch", SLOWER, "bottom"), ("ours", FASTER, "top")):
            milliseconds = [row["timings"][row["fastest"] if whose == "torch" else whose]["median"] for row in rows]
            mib = [memory[f"{group}, {row['name']}"][whose]["resident"] for row in rows]
            for ax, values in ((above, milliseconds), (below, mib)):
                ax.plot(lengths, values, "o-", color=color, markersize=4)
                ax.annotate(whose, (lengths[-1], values[-1]), (5, 0), textcoords="offset points", va=side, color=color)
        products = 3 if mode.training else 1  # a backward takes two for each of the forward
        above.plot(lengths, [products * cell.flops / peak for cell in cells], ":", color=INK, linewidth=1)
        above.set_title(group, loc="left", fontsize=10, fontweight="bold")
        below.set_xlabel("length, L = S")
        above.set(xscale="log", yscale="log", xlim=(100, 13000))
        below.set(yscale="log")
        above.xaxis.set_major_locator(FixedLocator([128, 512, 2048]))
        above.yaxis.set_major_locator(FixedLocator([1, 10, 100, 1000]))
        below.yaxis.set_major_locator(FixedLocator([1, 10, 100, 1000]))
    axes[0, 0].set_ylabel("ms; dotted: at the peak")
    axes[1, 0].set_ylabel("MiB beside in- and outputs")
    for ax in axes.flat:
        finish(ax)
    figure.savefig(path, dpi=200)


def sizes_of(row: Mapping[str, Any]) -> tuple[int, int, int, int, int]:
    """Those of a cell of self-attention, whose name is NxLxExH."""
    N, L, E, H = map(int, row["name"].split("x"))
    return N, L, L, E, H


def finish(ax: Axes) -> None:
    """Plain numbers, and no lines but a faint grid."""
    for axis in (ax.xaxis, ax.yaxis) if ax.get_yscale() == "log" else (ax.xaxis,):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.grid(color=FAINT, linewidth=0.6, axis="both" if ax.get_yscale() == "log" else "x")
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)


def draw_errors(path: Path) -> None:
    """Our largest error against torch's, both against fp64, for every quantity of many configurations."""
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for (dtype, name), ax in zip(dtypes.items(), figure.subplots(1, len(dtypes)), strict=True):
        found = [(c.torch_error, c.error) for c in comparisons(dtype) if c.torch_error > 0.0 and c.error > 0.0]
        lowest, highest = min(map(min, found)) / 1.5, max(map(max, found)) * 1.5
        ax.plot((lowest, highest), (lowest, highest), color=INK, linewidth=0.9)
        ax.plot(*zip(*found, strict=True), "o", color=FASTER, markersize=3, alpha=0.5, markeredgewidth=0)
        ax.set(xscale="log", yscale="log", xlim=(lowest, highest), ylim=(lowest, highest), aspect="equal")
        closer = sum(ours <= theirs for theirs, ours in found) / len(found)
        ax.set_title(f"{name}: {closer:.0%} no larger", loc="left", fontsize=10, fontweight="bold")
        ax.set_xlabel("torch's largest error")
        ax.tick_params(length=0, which="both")
        ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        if name == "fp32":
            ax.set_ylabel("our largest error")
    figure.savefig(path, dpi=200)


def comparisons(dtype: torch.dtype) -> Iterator[Comparison]:
    """Outputs, weights and gradients of the grid's training cases with averaged weights."""
    for case in grid():
        if case.training and case.need_weights and case.average_attn_weights and case.group in GROUPS_OF_ERRORS:
            ours, theirs, inputs, arguments = case._replace(dtype=dtype).build()
            yield from compare(ours, theirs, *inputs, **arguments)


def masks() -> dict[str, Tensor]:
    """The weights (L, S') of each kind of mask for keys that are all equal: what is hidden has the weight 0."""
    L = S = KEYS
    hidden = torch.zeros(1, S, dtype=torch.bool)
    hidden[:, 5:] = True
    drawn = torch.rand(L, S, generator=torch.Generator().manual_seed(4)) < 0.45
    drawn[2] = True  # a row that sees nothing
    position = torch.arange(float(L))
    virtual: dict[str, Any] = {"bias_k": torch.zeros(1, 4), "bias_v": torch.zeros(1, 4), "add_zero_attn": True}
    return {
        "top_left": weights_of(5, S, is_causal=True),
        "bottom_right": weights_of(5, S, is_causal=True, causal_alignment="bottom_right"),
        "window": weights_of(L, S, window=(2, 1)),
        "padding": weights_of(L, S, key_padding_mask=hidden),
        "bool": weights_of(L, S, attn_mask=drawn),
        "float": weights_of(L, S, attn_mask=-0.5 * (position[:, None] - position).abs()),
        "causal_padding": weights_of(L, S, is_causal=True, key_padding_mask=hidden),
        "virtual": weights_of(L, S, is_causal=True, **virtual),
    }


def weights_of(L: int, S: int, **arguments: Any) -> Tensor:
    query, key = torch.zeros(1, L, 1, 4), torch.zeros(1, S, 1, 4)
    weights = fused_mha.attention(query, key, key, need_weights=True, **arguments).weights
    assert weights is not None
    return weights[0]


def draw_mask(weights: Tensor, path: Path) -> None:
    """One cell for each query and key, as dark as its weight is large in its row."""
    L, S = weights.shape
    width, height, margin = CELL * S, CELL * L, 0.35
    figure = Figure(figsize=(width + margin, height + margin))
    ax = figure.add_axes((0.3 / (width + margin), 0.02, width / (width + margin), height / (height + margin)))
    largest = weights.amax(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)  # a row may see nothing
    for i, row in enumerate((weights / largest).tolist()):
        for j, weight in enumerate(row):
            color = FASTER if j < KEYS else VIRTUAL
            for fill, alpha in ((HIDDEN, 1.0), (color, weight)):
                ax.add_patch(Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, color=fill, alpha=alpha, linewidth=0))
    ax.set_xlim(0, S)
    ax.set_ylim(L, 0)
    ax.set_axis_off()
    ax.text(0, -0.25, "keys →", fontsize=8, va="bottom")
    ax.text(-0.3, 0, "queries →", fontsize=8, rotation=270, ha="right", va="top")
    figure.savefig(path, dpi=160, facecolor="white")


if __name__ == "__main__":
    main()

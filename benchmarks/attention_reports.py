"""What `bench_attention` measures beside the ratios to torch: shares of a peak, costs, scaling."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fused_mha.benchmark.attention_cells import MAIN, QUICK, Cell, forward, merged_mask, ours, sdpa, tensors
from fused_mha.benchmark.harness import Contender, GroupBar, Report, interleave, median_ms, skipped
from fused_mha.benchmark.yardsticks import fma_peak, share_of

PEAK_SHARE = GroupBar(0.75, 0.85)
TOKEN_LENGTHS, QUICK_TOKEN_LENGTHS = (1024, 2048, 4096, 8192, 16384), (256, 512)


def fma_share(options: argparse.Namespace) -> Report:
    """Operations a second of the two products, N * H * L * S * D * 4, over the machine's, in the same rounds."""
    try:
        peak = fma_peak(options.threads)
    except RuntimeError as error:
        return skipped(str(error))
    lines, cells, shares = [], [], []
    for cell in QUICK if options.quick else MAIN:
        N, H, L, S, D = cell
        call = forward(ours(), tensors(cell).inputs)
        mine, highest, share = share_of(peak, call, 4 * N * H * L * S * D, options.seconds / 2)
        lines.append(f"{cell}: {mine:.0f} GF/s of {highest:.0f}, {share:.0%}")
        cells.append({"name": str(cell), "gflops": mine, "peak_gflops": highest, "share": share})
        shares.append(share)
    mean = statistics.mean(shares)
    lines.append(f"mean {mean:.0%} (at least {PEAK_SHARE.at_least:.0%}, aim {PEAK_SHARE.aim:.0%})")
    values = {"cells": cells, "mean_share": mean, **PEAK_SHARE._asdict()}
    return Report(lines, values, mean >= PEAK_SHARE.at_least)


def call_overhead(options: argparse.Namespace) -> Report:
    """What a call costs where there is next to nothing to compute."""
    cell = Cell(1, 8, 7, 7, 64)
    given = tensors(cell).inputs
    contenders = {"ours": forward(ours(), given), "sdpa": forward(sdpa(), given)}
    rounds = interleave(contenders, options.seconds)
    microseconds = {name: statistics.median(turn[name] for turn in rounds) * 1e3 for name in contenders}
    line = ", ".join(f"{name} {value:.1f} µs" for name, value in microseconds.items())
    return Report([f"{cell}: {line}"], {"cell": str(cell), "microseconds": microseconds})


def thread_scaling(options: argparse.Namespace) -> Report:
    """One thread's time over that of all."""
    if options.threads == 1:
        return skipped("it takes more than one thread")
    cell = QUICK[0] if options.quick else Cell(1, 16, 2048, 2048, 64)
    run = forward(ours(), tensors(cell).inputs)

    def on(threads: int) -> Contender:
        def call() -> tuple[Tensor, ...]:
            torch.set_num_threads(threads)
            return run()

        return call

    try:
        rounds = interleave({"one": on(1), "all": on(options.threads)}, options.seconds)
    finally:
        torch.set_num_threads(options.threads)
    ratio = statistics.median(turn["one"] / turn["all"] for turn in rounds)
    return Report([f"{cell}: {ratio:.2f}x with {options.threads} threads"], {"cell": str(cell), "ratio": ratio})


def token_cost(options: argparse.Namespace) -> Report:
    """Microseconds for each query token of each head, which grow with S."""
    lines, lengths = [], QUICK_TOKEN_LENGTHS if options.quick else TOKEN_LENGTHS
    costs: dict[str, list[float]] = {"ours": [], "sdpa": []}
    for length in lengths:
        given = tensors(Cell(1, 2, length, length, 64)).inputs
        rounds = interleave({"ours": forward(ours(), given), "sdpa": forward(sdpa(), given)}, options.seconds)
        for name, cost in costs.items():
            cost.append(statistics.median(turn[name] for turn in rounds) * 1e3 / (length * 2))
        lines.append(f"L = S = {length}: " + ", ".join(f"{name} {cost[-1]:.3f} µs" for name, cost in costs.items()))
    _plot_token_cost(lengths, costs, options.out / "attention_tokens.png")
    return Report(lines, {"lengths": lengths, "microseconds": costs})


def _plot_token_cost(lengths: tuple[int, ...], costs: dict[str, list[float]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415  a bench extra that the table does without

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, cost), colour in zip(costs.items(), ("#2a7f62", "#b8442f"), strict=True):
        axes.plot(lengths, cost, "o-", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="L = S", ylabel="µs for each query token and head")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_title("fp32 forward, 2 heads, D = 64")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def mask_merging(options: argparse.Namespace) -> Report:
    """The time to merge causality and padding into the mask that torch's fused op takes; the ratios leave it out."""
    lines, milliseconds = [], {}
    for cell in QUICK if options.quick else MAIN:
        if cell.D == MAIN[0].D or options.quick:  # the mask does not depend on D
            padding = tensors(cell).key_padding_mask
            milliseconds[str(cell)] = median_ms(lambda c=cell, p=padding: merged_mask(c, p), options.seconds / 10)
            lines.append(f"{cell}: {milliseconds[str(cell)]:.3f} ms")
    return Report(lines, {"milliseconds": milliseconds})


REPORTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "share of the multiply-add peak, fp32 forward": fma_share,
    "call overhead": call_overhead,
    "scaling from one thread to all": thread_scaling,
    "cost of a token": token_cost,
    "merging causality and padding for torch": mask_merging,
}

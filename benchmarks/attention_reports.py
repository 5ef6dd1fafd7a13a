"""What `bench_attention` measures beside the ratios to torch: shares of a peak, costs, scaling, ONNX Runtime."""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attention_cells import MAIN, QUICK, Cell, forward, merged_mask, ours, sdpa, tensors
from fma_peak import FmaPeak

from run import Contender, GroupBar, Report, interleave

PEAK_SHARE = GroupBar(0.75, 0.85)
ONNX_RUNTIME = GroupBar(1.05, 1.2)
ONNX_TURNS, QUICK_ONNX_TURNS = 5, 1
PAUSE = 1.0  # seconds, in which idle threads of the other runtime go to sleep
TOKEN_LENGTHS, QUICK_TOKEN_LENGTHS = (1024, 2048, 4096, 8192, 16384), (256, 512)


def fma_share(options: argparse.Namespace) -> Report:
    """Operations a second of the two products, N * H * L * S * D * 4, over the machine's, in the same rounds."""
    try:
        peak = FmaPeak(options.threads)
    except RuntimeError as error:
        return _skipped(str(error))
    lines, cells, shares = [], [], []
    for cell in QUICK if options.quick else MAIN:
        N, H, L, S, D = cell
        rounds = interleave({"ours": forward(ours(), tensors(cell).inputs), "peak": peak}, options.seconds / 2)
        speeds = [(4 * N * H * L * S * D / turn["ours"] / 1e6, peak.flops / turn["peak"] / 1e6) for turn in rounds]
        share = statistics.median(mine / highest for mine, highest in speeds)
        mine, highest = (statistics.median(column) for column in zip(*speeds, strict=True))
        lines.append(f"{cell}: {mine:.0f} GF/s of {highest:.0f}, {share:.0%}")
        cells.append({"name": str(cell), "gflops": mine, "peak_gflops": highest, "share": share})
        shares.append(share)
    mean = statistics.mean(shares)
    lines.append(f"mean {mean:.0%} (at least {PEAK_SHARE.at_least:.0%}, aim {PEAK_SHARE.aim:.0%})")
    values = {"cells": cells, "mean_share": mean, **PEAK_SHARE._asdict()}
    return Report(lines, values, mean >= PEAK_SHARE.at_least)


def onnx_runtime(options: argparse.Namespace) -> Report:
    """ONNX Runtime's own fused `MultiHeadAttention`, in turns over all cells with pauses between the two runtimes."""
    try:
        onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    except ImportError as error:
        return _skipped(f"{error}; pip install onnx onnxruntime")
    cells = QUICK if options.quick else MAIN
    mine: list[Contender] = [forward(ours(), tensors(cell).inputs) for cell in cells]
    theirs: list[Contender] = [_onnx_runtime_contender(onnx, runtime, cell, options.threads) for cell in cells]
    turns = QUICK_ONNX_TURNS if options.quick else ONNX_TURNS
    seconds = options.seconds / (2 * turns)
    times: dict[str, list[list[float]]] = {"ours": [[] for _ in cells], "onnxruntime": [[] for _ in cells]}
    for _ in range(turns):
        for name, calls in (("ours", mine), ("onnxruntime", theirs)):
            time.sleep(PAUSE)
            for place, call in enumerate(calls):
                times[name][place].append(_median_ms(call, seconds))
    lines, rows, ratios = [], [], []
    for place, cell in enumerate(cells):
        by_name = {name: statistics.median(turns_of[place]) for name, turns_of in times.items()}
        pairs = zip(times["onnxruntime"][place], times["ours"][place], strict=True)
        ratios.append(statistics.median(a / b for a, b in pairs))
        lines.append(f"{cell}: {ratios[-1]:.2f}x  ms: " + "  ".join(f"{n} {ms:.3f}" for n, ms in by_name.items()))
        rows.append({"name": str(cell), "ms": by_name, "ratio": ratios[-1]})
    mean = statistics.geometric_mean(ratios)
    lines.append(f"geometric mean {mean:.2f}x (at least {ONNX_RUNTIME.at_least:.2f}, aim {ONNX_RUNTIME.aim:.2f})")
    values = {"onnxruntime": runtime.__version__, "cells": rows, "geometric_mean": mean, **ONNX_RUNTIME._asdict()}
    return Report(lines, values, mean >= ONNX_RUNTIME.at_least)


def _onnx_runtime_contender(onnx: ModuleType, runtime: ModuleType, cell: Cell, threads: int) -> Callable[[], object]:
    """A call on bound buffers; raises AssertionError if its result is not ours."""
    N, H, L, S, D = cell
    helper: Any = onnx.helper
    shapes = {"query": (N, L, H * D), "key": (N, S, H * D), "value": (N, S, H * D), "output": (N, L, H * D)}
    infos = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    inputs = list(shapes)[:3]
    node = helper.make_node("MultiHeadAttention", inputs, ["output"], domain="com.microsoft", num_heads=H)
    graph = helper.make_graph([node], "attention", [infos[name] for name in inputs], [infos["output"]])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)  # old enough for any runtime of today
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    given = tensors(cell).inputs
    for name, x in zip(inputs, given, strict=True):
        binding.bind_cpu_input(name, x.reshape(shapes[name]).numpy())
    output = torch.empty(shapes["output"])
    binding.bind_output("output", "cpu", 0, "float32", shapes["output"], output.data_ptr())

    def call() -> Tensor:  # which keeps the output's memory: the binding knows no more than its address
        session.run_with_iobinding(binding)
        return output

    torch.testing.assert_close(call().reshape(N, L, H, D), forward(ours(), given)()[0], rtol=1e-4, atol=1e-5)
    return call


def _median_ms(call: Contender, seconds: float) -> float:
    return statistics.median(turn["call"] for turn in interleave({"call": call}, seconds))


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
        return _skipped("it takes more than one thread")
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
            milliseconds[str(cell)] = _median_ms(lambda c=cell, p=padding: merged_mask(c, p), options.seconds / 10)
            lines.append(f"{cell}: {milliseconds[str(cell)]:.3f} ms")
    return Report(lines, {"milliseconds": milliseconds})


def _skipped(reason: str) -> Report:
    return Report([f"skipped: {reason}"], {"skipped": reason})


REPORTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "share of the multiply-add peak, fp32 forward": fma_share,
    "ONNX Runtime, fp32 forward": onnx_runtime,
    "call overhead": call_overhead,
    "scaling from one thread to all": thread_scaling,
    "cost of a token": token_cost,
    "merging causality and padding for torch": mask_merging,
}

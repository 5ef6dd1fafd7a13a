"""Other runtimes beside ours, each in a process of its own, in many short turns in random order.

In one process the idle threads of one runtime slow the next, and a machine that is slow for seconds is slow for one of
them alone. `attention_reports` and `module_peers` measure by this.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fused_mha.benchmark.harness import MIN_ROUNDS, Contender, GroupBar, Report, interleave

TURNS_PER_SECOND, LEAST_TURNS = 20, 3
TURN = 0.02  # seconds, after the calls that warm up
PAUSE = 0.05  # seconds, in which idle threads of the other runtime stop spinning
Make = Callable[[], Sequence[Contender]]  # the calls of all cells; it is pickled and runs in the contender's process

_calls: list[Contender] = []  # of this process, if it is a contender's


def median_ms(call: Contender, seconds: float, min_rounds: int = MIN_ROUNDS) -> float:
    """Milliseconds of a call."""
    return statistics.median(turn["call"] for turn in interleave({"call": call}, seconds, min_rounds))


def in_turns(
    contenders: Mapping[str, Make], cells: Sequence[str], bar: GroupBar, options: argparse.Namespace
) -> Report:
    """The fastest other runtime's time over ours: for each cell the median over the turns, and their spread."""
    turns = LEAST_TURNS if options.quick else max(LEAST_TURNS, round(options.seconds * TURNS_PER_SECOND))
    generator = random.Random(options.seed)
    order = [place for place in range(len(cells)) for _ in range(turns)]
    generator.shuffle(order)
    times: list[list[dict[str, float]]] = [[] for _ in cells]
    with contextlib.ExitStack() as stack:
        pools = {}
        for name, make in contenders.items():  # one after the other: each may choose the fastest of its calls
            context = multiprocessing.get_context("spawn")
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, context))
            pools[name].submit(_make, make, options.threads).result()
        for place in tqdm(order, desc="turns", disable=not sys.stderr.isatty(), leave=False):
            turn = {}
            for name in generator.sample(list(pools), len(pools)):
                time.sleep(PAUSE)
                turn[name] = pools[name].submit(_time, place).result()
            times[place].append(turn)
    return compared(times, cells, bar)


def _make(make: Make, threads: int) -> None:
    torch.set_num_threads(threads)
    _calls.extend(make())


def _time(place: int) -> float:
    return median_ms(_calls[place], TURN, min_rounds=1)


def compared(times: Sequence[Sequence[Mapping[str, float]]], cells: Sequence[str], bar: GroupBar) -> Report:
    """What the milliseconds of each cell, turn and contender come to."""
    lines, rows, ratios = [], [], []
    for cell, turns in zip(cells, times, strict=True):
        by_name = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        fastest = min((name for name in by_name if name != "ours"), key=by_name.__getitem__)
        of_turns = [turn[fastest] / turn["ours"] for turn in turns]
        low, *_, high = statistics.quantiles(of_turns, n=5, method="inclusive")
        ratios.append(statistics.median(of_turns))
        spread = f"[{low:.2f}-{high:.2f}] in {len(turns)} turns"
        lines.append(
            f"{cell}: {ratios[-1]:.2f}x {spread}  ms: " + "  ".join(f"{n} {ms:.3f}" for n, ms in by_name.items())
        )
        rows.append({"name": cell, "ms": by_name, "ratio": ratios[-1], "percentile_20": low, "percentile_80": high})
    mean = statistics.geometric_mean(ratios)
    lines.append(f"geometric mean {mean:.2f}x (at least {bar.at_least:.2f}, aim {bar.aim:.2f})")
    return Report(lines, {"cells": rows, "geometric_mean": mean, **bar._asdict()}, mean >= bar.at_least)


def onnx_runtime_call(
    nodes: Sequence[object],
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    output_shape: tuple[int, ...],
    options: argparse.Namespace,
    *,
    spinning: bool,
) -> Callable[[], Tensor]:
    """A call of the graph of ``nodes``, which ends in "output", on bound fp32 buffers."""
    onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    helper: Any = onnx.helper
    shapes = {**{name: tuple(x.shape) for name, x in inputs.items()}, "output": output_shape}
    infos = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    initializers = [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "graph", [infos[name] for name in inputs], [infos["output"]], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)  # old enough for any runtime of today
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    session = runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, x in inputs.items():
        binding.bind_cpu_input(name, x.numpy())
    output = torch.empty(output_shape)
    binding.bind_output("output", "cpu", 0, "float32", output_shape, output.data_ptr())

    def call() -> Tensor:  # which keeps the output's memory: the binding knows no more than its address
        session.run_with_iobinding(binding)
        return output

    return call

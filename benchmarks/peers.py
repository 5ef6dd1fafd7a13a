"""Other runtimes beside ours: in turns, with pauses between them, as the idle threads of one would slow the next."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from run import Contender, GroupBar, Report, interleave

TURNS, QUICK_TURNS = 5, 1
PAUSE, QUICK_PAUSE = 1.0, 0.1  # seconds, in which idle threads of the other runtime go to sleep


def median_ms(call: Contender, seconds: float) -> float:
    """Milliseconds of a call."""
    return statistics.median(turn["call"] for turn in interleave({"call": call}, seconds))


def in_turns(
    contenders: Mapping[str, Sequence[Contender]], cells: Sequence[str], bar: GroupBar, options: argparse.Namespace
) -> Report:
    """The fastest other runtime's time over ours, a runtime's calls of all cells after those of another."""
    turns, pause = (QUICK_TURNS, QUICK_PAUSE) if options.quick else (TURNS, PAUSE)
    seconds = options.seconds / (2 * turns)
    times: dict[str, list[list[float]]] = {name: [[] for _ in cells] for name in contenders}
    for _ in range(turns):
        for name, calls in contenders.items():
            time.sleep(pause)
            for place, call in enumerate(calls):
                times[name][place].append(median_ms(call, seconds))
    lines, rows, ratios = [], [], []
    for place, cell in enumerate(cells):
        by_name = {name: statistics.median(of_cells[place]) for name, of_cells in times.items()}
        fastest = min((name for name in by_name if name != "ours"), key=by_name.__getitem__)
        pairs = zip(times[fastest][place], times["ours"][place], strict=True)
        ratios.append(statistics.median(a / b for a, b in pairs))
        lines.append(f"{cell}: {ratios[-1]:.2f}x  ms: " + "  ".join(f"{n} {ms:.3f}" for n, ms in by_name.items()))
        rows.append({"name": cell, "ms": by_name, "ratio": ratios[-1]})
    mean = statistics.geometric_mean(ratios)
    lines.append(f"geometric mean {mean:.2f}x (at least {bar.at_least:.2f}, aim {bar.aim:.2f})")
    return Report(lines, {"cells": rows, "geometric_mean": mean, **bar._asdict()}, mean >= bar.at_least)


def onnx_runtime_call(
    onnx: ModuleType,
    runtime: ModuleType,
    nodes: Sequence[object],
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    output_shape: tuple[int, ...],
    options: argparse.Namespace,
    *,
    spinning: bool,
) -> Callable[[], Tensor]:
    """A call of the graph of ``nodes``, which ends in "output", on bound fp32 buffers."""
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

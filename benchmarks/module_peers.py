"""ONNX Runtime and OpenVINO beside our module in inference, without weights: `bench_module`'s reports of them."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_mha.benchmark.harness import Contender, GroupBar, Report, skipped
from fused_mha.benchmark.module_cells import (
    QUICK_SELF_ATTENTION,
    SELF_ATTENTION,
    SMALL,
    Cell,
    Mode,
    Run,
    assert_close,
    inference,
    inputs,
    modules,
)
from peers import Make, in_turns, median_ms, onnx_runtime_call

PEERS = GroupBar(1.0, 1.1)
MICROSOFT = "com.microsoft"
RunsOf = Callable[[Cell, torch.dtype, nn.MultiheadAttention, argparse.Namespace], list[Run]]


def onnx_runtime_and_openvino(options: argparse.Namespace) -> Report:
    """The faster of the two over ours in fp32, each by the fastest of its ways to say the module."""
    try:
        _, runtime, openvino = (importlib.import_module(name) for name in ("onnx", "onnxruntime", "openvino"))
    except ImportError as error:
        return skipped(f"{error}; pip install onnx onnxruntime openvino")
    report = _beside_ours(torch.float32, {"onnxruntime": _onnx_runtime_runs, "openvino": _openvino_runs}, options)
    versions = {"onnxruntime": runtime.__version__, "openvino": openvino.__version__}
    return report._replace(values={**versions, **report.values})


def openvino_bf16(options: argparse.Namespace) -> Report:
    """OpenVINO over ours, both in bf16 from input to output."""
    try:
        openvino = importlib.import_module("openvino")
    except ImportError as error:
        return skipped(f"{error}; pip install openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return skipped("OpenVINO computes in bf16 only on processors that do")
    report = _beside_ours(torch.bfloat16, {"openvino": _openvino_runs}, options)
    return report._replace(values={"openvino": openvino.__version__, **report.values})


REPORTS = {
    "ONNX Runtime and OpenVINO, fp32 inference": onnx_runtime_and_openvino,
    "OpenVINO, bf16 inference": openvino_bf16,
}


def _cells(options: argparse.Namespace) -> tuple[Cell, ...]:
    return QUICK_SELF_ATTENTION if options.quick else (*SELF_ATTENTION, SMALL[0])


def _beside_ours(dtype: torch.dtype, peers: dict[str, RunsOf], options: argparse.Namespace) -> Report:
    """Ours and the fastest run of each peer; raises AssertionError if a result is not ours."""
    contenders: dict[str, Make] = {"ours": functools.partial(_our_calls, dtype, options)}
    for name, runs_of in peers.items():
        contenders[name] = functools.partial(_fastest_calls, runs_of, dtype, options)
    return in_turns(contenders, [str(cell) for cell in _cells(options)], PEERS, options)


def _our_calls(dtype: torch.dtype, options: argparse.Namespace) -> list[Run]:
    mode = Mode(dtype)
    return [inference(modules(cell, mode).ours, cell, mode) for cell in _cells(options)]


def _fastest_calls(runs_of: RunsOf, dtype: torch.dtype, options: argparse.Namespace) -> list[Contender]:
    calls: list[Contender] = []
    for cell, our_call in zip(_cells(options), _our_calls(dtype, options), strict=True):
        runs = runs_of(cell, dtype, modules(cell, Mode(dtype)).theirs, options)
        for run in runs:
            assert_close(run(), our_call())
        calls.append(min(runs, key=lambda run: median_ms(run, options.seconds / 10)))
    return calls


def _onnx_runtime_runs(
    cell: Cell, dtype: torch.dtype, module: nn.MultiheadAttention, options: argparse.Namespace
) -> list[Run]:
    """Its graph with a product for each of query, key and value, and the one with its packed `Attention`."""
    assert dtype == torch.float32, "its kernels on CPUs have no other"
    onnx = importlib.import_module("onnx")
    N, L, _, E, H = cell
    node: Callable[..., Any] = onnx.helper.make_node
    weights = dict(zip(("query", "key", "value"), module.in_proj_weight.detach().chunk(3), strict=True))
    biases = dict(zip(weights, module.in_proj_bias.detach().chunk(3), strict=True))
    shared = {
        "rows": torch.tensor([N * L, E]),
        "batch": torch.tensor([N, L, E]),
        "out_weight": module.out_proj.weight.detach(),
        "out_bias": module.out_proj.bias.detach(),
    }

    def linear(name: str, before: str, after: str, weight: str, bias: str) -> list[Any]:
        """Gemm adds the bias while it multiplies, unlike MatMul; it takes rows, and reshaping them costs nothing."""
        return [
            node("Reshape", [before, "rows"], [f"{name}_rows"]),
            node("Gemm", [f"{name}_rows", weight, bias], [f"{name}_product"], transB=1),
            node("Reshape", [f"{name}_product", "batch"], [after]),
        ]

    last = linear("out", "heads", "output", "out_weight", "out_bias")
    separate = [step for name in weights for step in linear(name, "x", name, f"{name}_weight", f"{name}_bias")]
    separate += [node("MultiHeadAttention", list(weights), ["heads"], domain=MICROSOFT, num_heads=H), *last]
    separate_constants = {f"{name}_weight": weight for name, weight in weights.items()}
    separate_constants |= {f"{name}_bias": bias for name, bias in biases.items()}
    packed = [node("Attention", ["x", "weight", "bias"], ["heads"], domain=MICROSOFT, num_heads=H), *last]
    packed_constants = {"weight": module.in_proj_weight.detach().T.contiguous(), "bias": module.in_proj_bias.detach()}
    given = {"x": inputs(cell)[0]}
    calls = (
        onnx_runtime_call(nodes, given, {**shared, **constants}, (N, L, E), options, spinning=True)
        for nodes, constants in ((separate, separate_constants), (packed, packed_constants))
    )
    return [lambda call=call: (call(),) for call in calls]


class _Stock(nn.Module):
    """Torch's module as OpenVINO reads it, with one product for query, key and value or one for each."""

    def __init__(self, module: nn.MultiheadAttention, *, packed: bool) -> None:
        super().__init__()
        self.module = module.float()  # OpenVINO rounds by itself
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        if self.packed:
            parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
        else:
            parts = map(F.linear, (x, x, x), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3))
        query, key, value = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(query, key, value)
        return module.out_proj(heads.transpose(1, 2).flatten(2))


def _openvino_runs(
    cell: Cell, dtype: torch.dtype, module: nn.MultiheadAttention, options: argparse.Namespace
) -> list[Run]:
    """Both ways to write the projections, compiled for ``dtype`` from input to output."""
    openvino = importlib.import_module("openvino")
    return [_openvino_run(openvino, cell, dtype, _Stock(module, packed=packed), options) for packed in (True, False)]


def _openvino_run(
    openvino: ModuleType, cell: Cell, dtype: torch.dtype, module: nn.Module, options: argparse.Namespace
) -> Run:
    x = inputs(cell, dtype)[0]
    output = torch.empty_like(x)
    of_type, precision = {
        torch.float32: (openvino.Type.f32, "f32"),
        torch.bfloat16: (openvino.Type.bf16, "bf16"),
    }[dtype]
    with torch.no_grad():
        model = openvino.convert_model(module.eval(), example_input=x.float(), input=[tuple(x.shape)])
    steps = openvino.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(of_type)
    steps.output().tensor().set_element_type(of_type)
    settings = {
        "INFERENCE_NUM_THREADS": options.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(steps.build(), "CPU", settings).create_infer_request()

    def shared(tensor: Tensor) -> Any:
        array = tensor.view(torch.int16 if dtype == torch.bfloat16 else dtype).numpy()  # NumPy has no bf16
        return openvino.Tensor(array, openvino.Shape(tensor.shape), of_type)

    request.set_input_tensor(shared(x))
    request.set_output_tensor(shared(output))

    def run() -> tuple[Tensor, ...]:
        request.infer()
        return (output,)

    return run

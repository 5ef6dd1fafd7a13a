"""OpenVINO's calls of the module, for `peers`: inference without masks, in fp32, and in bf16 from input to output."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_mha.benchmark.module_cells import ModuleCall, Run, inputs, modules

PACKAGES = ("openvino",)
DTYPES = (torch.float32, torch.bfloat16)


def has_bf16() -> bool:
    """Whether it computes in bf16 on this processor."""
    openvino = importlib.import_module("openvino")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def runs(call: ModuleCall) -> list[Run]:
    """Both ways to write the projections, compiled for the call's dtype."""
    return [_run(call, _Stock(modules(*call).theirs, packed=packed)) for packed in (True, False)]


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


def _run(call: ModuleCall, module: nn.Module) -> Run:
    openvino = importlib.import_module("openvino")
    dtype = call.mode.dtype
    x = inputs(call.cell, dtype)[0]
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
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
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

"""ONNX Runtime's calls of the module and of attention on split heads, for `peers`: fp32 inference without masks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_mha.benchmark.attention_cases import AttentionCall
from fused_mha.benchmark.attention_cells import tensors
from fused_mha.benchmark.module_cells import ModuleCall, Run, inputs, modules

PACKAGES = ("onnx", "onnxruntime")
DTYPES = (torch.float32,)  # its kernels on CPUs have no other
MICROSOFT = "com.microsoft"


def runs(call: ModuleCall | AttentionCall) -> list[Run]:
    """Every way to say the call, on bound buffers."""
    return [_attention(call)] if isinstance(call, AttentionCall) else _modules(call)


def _attention(call: AttentionCall) -> Run:
    N, H, L, _, D = call.cell
    query, key, value = (x.flatten(2) for x in tensors(call.cell).inputs)
    given = {"query": query, "key": key, "value": value}
    node = importlib.import_module("onnx").helper.make_node
    nodes = [node("MultiHeadAttention", list(given), ["output"], domain=MICROSOFT, num_heads=H)]
    run = _session_call(nodes, given, {}, (N, L, H * D), spinning=False)
    return lambda: (run().unflatten(-1, (H, D)),)


def _modules(call: ModuleCall) -> list[Run]:
    """Its graph with a product for each of query, key and value, and the one with its packed `Attention`."""
    N, L, _, E, H = call.cell
    module = modules(*call).theirs
    node: Callable[..., Any] = importlib.import_module("onnx").helper.make_node
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
    given = {"x": inputs(call.cell)[0]}
    calls = (
        _session_call(nodes, given, {**shared, **constants}, (N, L, E), spinning=True)
        for nodes, constants in ((separate, separate_constants), (packed, packed_constants))
    )
    return [lambda call=call: (call(),) for call in calls]


def _session_call(
    nodes: Sequence[object],
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    output_shape: tuple[int, ...],
    *,
    spinning: bool,
) -> Callable[[], Tensor]:
    """A call of the graph of ``nodes``, which ends in "output", on bound fp32 buffers."""
    onnx, runtime = map(importlib.import_module, PACKAGES)
    helper: Any = onnx.helper
    shapes = {**{name: tuple(x.shape) for name, x in inputs.items()}, "output": output_shape}
    infos = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    initializers = [onnx.numpy_helper.from_array(x.numpy(), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "graph", [infos[name] for name in inputs], [infos["output"]], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)  # old enough for any runtime of today
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
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

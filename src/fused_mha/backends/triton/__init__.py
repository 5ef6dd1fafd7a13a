"""The fused CUDA core in Triton, which CUDA builds of torch bring along: registers its kernels, and serves `dispatch`.

Where torch's own kernels are the faster ones and as right, they serve: `delegation` has the rules.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from fused_mha.backends import delegation
from fused_mha.backends.arguments import arguments_of
from fused_mha.backends.capability import Backend, Capability, Served, ServedModule
from fused_mha.backends.triton.tile_config import MOST_HEAD_SIZE
from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.memory import unit_of
from fused_mha.ops import fallback, schema
from fused_mha.ops.module import Call

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kernels() -> Any:
    from fused_mha.backends.triton import launch  # noqa: PLC0415 - the first call needs it, not the import

    return launch


def assemblers() -> list[str]:
    """Which assembler makes the kernels' code for each GPU, for `python -m fused_mha.info`."""
    if not _IS_INSTALLED:
        return []
    from fused_mha.backends.triton import assembler  # noqa: PLC0415

    return [f"cuda:{i}: {assembler.of_device(i).summary}" for i in range(torch.cuda.device_count())]


def _attention(*inputs: Any) -> tuple[Tensor, ...]:
    query, key, value = inputs[:3]
    is_served = query.numel() > 0 and key.numel() > 0
    if is_served and query.dtype in _DTYPES and max(query.shape[3], value.shape[3]) <= MOST_HEAD_SIZE:
        return _kernels().attention(*inputs)
    return fallback.attention(*inputs)  # a graph that was exported with the operator, on another device


def _attention_backward(*inputs: Any) -> tuple[Tensor, ...]:
    return _kernels().attention_backward(*inputs)


def _run(inputs: AttentionInputs) -> AttentionResult:
    output, weights, lse, _ = schema.attention(*arguments_of(inputs))
    return AttentionResult(output, weights if inputs.need_weights else None, lse if inputs.return_lse else None)


def _served(inputs: AttentionInputs) -> Served:
    from fused_mha.backends.triton import eager  # noqa: PLC0415 - as above

    return eager.Kept(inputs)


def _serves_module(call: Call) -> ServedModule | None:
    from fused_mha.backends.triton import module  # noqa: PLC0415 - as above

    head_size = call.query.shape[-1] // call.num_heads
    return None if head_size % unit_of(call.query) else module.Kept(call)


def _leaves_to_torch(inputs: AttentionInputs) -> delegation.Rule | None:
    rule = delegation.rule_of(inputs)
    return None if rule.serves == "triton" else rule


def _notes(inputs: AttentionInputs) -> list[str]:
    rule = delegation.rule_of(inputs)
    notes = [str(rule)] if rule.serves == "triton" else []  # not where it was forced
    if inputs.need_weights:
        notes.append("the weights are computed by a second kernel from the rows' log-sum-exp")
    return notes


_IS_INSTALLED = importlib.util.find_spec("triton") is not None

if _IS_INSTALLED:
    schema.LIBRARY.impl("attention", _attention, "CUDA")
    schema.LIBRARY.impl("attention_backward", _attention_backward, "CUDA")

BACKEND = Backend(
    name="triton",
    summary="the fused core in Triton, for CUDA" + ("" if _IS_INSTALLED else ", not in this installation"),
    capability=Capability(
        is_installed=_IS_INSTALLED,
        devices=("cuda",),
        dtypes=_DTYPES,
        transforms=False,
        onnx_export=False,
        reads_hidden_keys=False,
        empty_tensors=False,
        most_head_size=MOST_HEAD_SIZE,
        cuda_capability=(8, 0),
    ),
    run=_run,
    notes=_notes,
    leaves=_leaves_to_torch,
    served=_served,
    serves_module=_serves_module,
)

"""What a back end can serve, and the reasons why it cannot; `dispatch` asks, `explain` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.modes import onnx_export_is_active, transform_is_active
from fused_mha.ops.module import Call


class Capability(NamedTuple):
    """The requests that a back end can serve; everything that is not named here, each back end serves."""

    is_installed: bool = True
    devices: tuple[str, ...] | None = None  # None is any
    dtypes: tuple[torch.dtype, ...] | None = None  # None is any
    weights: bool = True
    lse: bool = True
    transforms: bool = True  # torch.func and forward-mode AD
    onnx_export: bool = True  # by either of torch's exporters
    onnx_trace: bool = True  # by the older one, torch.onnx.export(dynamo=False)
    score_options: bool = True  # softcap, sinks, alibi_slopes
    packed_sequences: bool = True
    reads_hidden_keys: bool = True  # 0 * NaN = NaN: zeros have to take the place of keys that are hidden from all
    empty_tensors: bool = True
    cpu_dropout: bool = True
    off_cpu_half_masks: bool = True  # any but plain causal, on other devices than the CPU and in ONNX
    most_head_size: int | None = None  # None is any
    cuda_capability: tuple[int, int] | None = None  # the least; None is any


_Some = Tensor | None
# Query, key, value, sinks, alibi_slopes, attn_mask, key_padding_mask, bias_k, bias_v, cu_seqlens_q and cu_seqlens_k.
ServedTensors = tuple[Tensor, Tensor, Tensor, _Some, _Some, _Some, _Some, _Some, _Some, _Some, _Some]
# Serves the calls of which these differ from another's by values alone; the last two may be left out.
Served = Callable[..., AttentionResult]
# The tensors of `ops.module.Call`; output and weights.
ServedModule = Callable[[Sequence[Tensor | None]], tuple[Tensor, Tensor | None]]


class Backend(NamedTuple):
    """A named implementation of attention."""

    name: str
    summary: str
    capability: Capability
    run: Callable[[AttentionInputs], AttentionResult]
    notes: Callable[[AttentionInputs], list[str]]  # what `explain` says of a call that it serves
    leaves: Callable[[AttentionInputs], object] = lambda _: None  # why it leaves a call that it could serve, or None
    served: Callable[[AttentionInputs], Served | None] = lambda _: None  # what serves eager calls of one kind faster
    serves_module: Callable[[Call], ServedModule | None] = lambda _: None  # what does so with the projections


def device_reason(capability: Capability, device: torch.device) -> str | None:
    """Why a back end serves no call on a device; None if it serves some."""
    if capability.devices is not None and device.type not in capability.devices:
        return f"it runs on {', '.join(capability.devices)} alone (query is on {device.type})"
    if capability.cuda_capability is not None and torch.cuda.is_available():
        chip = torch.cuda.get_device_capability(device)
        if chip < capability.cuda_capability:
            needed = ".".join(map(str, capability.cuda_capability))
            return f"it needs a GPU of compute capability {needed} (it is {chip[0]}.{chip[1]})"
    return None if capability.is_installed else "it is not in this installation"


def not_supported_reasons(capability: Capability, inputs: AttentionInputs) -> list[str]:
    """Why a back end cannot serve these inputs; an empty list if it can."""
    of_device = device_reason(capability, inputs.query.device)
    reasons = [] if of_device is None else [of_device]
    if not capability.is_installed:
        return reasons
    device = inputs.query.device.type
    if inputs.need_weights and not capability.weights:
        heads = inputs.weights_of_heads
        asked = "need_weights=True" if heads is None else f"weights_of_heads={heads}"
        reasons.append(f"it returns no attention weights ({asked})")
    if inputs.return_lse and not capability.lse:
        reasons.append("it returns no log-sum-exp (return_lse=True)")
    if (options := inputs.score_options()) and not capability.score_options:
        reasons.append(f"it knows no {' and no '.join(options)}")
    if inputs.cu_seqlens_q is not None and not capability.packed_sequences:
        reasons.append("it knows no packed sequences (cu_seqlens_q)")
    if capability.dtypes is not None:
        masks = (inputs.attn_mask, inputs.key_padding_mask)
        dtypes = {inputs.query.dtype, *(mask.dtype for mask in masks if mask is not None)} - {torch.bool}
        unknown = [str(dtype) for dtype in dtypes if dtype not in capability.dtypes]
        if unknown:
            reasons.append(f"it knows no {' and no '.join(sorted(unknown))}")
    if inputs.dropout_p > 0.0 and not capability.cpu_dropout and device == "cpu":
        reasons.append(f"it has no fused dropout on the CPU (dropout_p={inputs.dropout_p})")
    in_onnx = onnx_export_is_active()
    is_half = inputs.query.dtype in (torch.float16, torch.bfloat16)
    if not capability.off_cpu_half_masks and is_half and inputs.needs_mask_tensor() and (in_onnx or device != "cpu"):
        where = "ONNX" if in_onnx else device
        reasons.append(f"its kernels for {where} are not known to be right with a mask in {inputs.query.dtype}")
    head_size = max(inputs.query.shape[3], inputs.value.shape[3])
    if capability.most_head_size is not None and head_size > capability.most_head_size:
        reasons.append(f"its largest head size is {capability.most_head_size} (it is {head_size})")
    if not capability.empty_tensors and 0 in (inputs.query.numel(), inputs.key.numel()):
        reasons.append(f"an input is empty (query {tuple(inputs.query.shape)}, key {tuple(inputs.key.shape)})")
    if not capability.transforms and transform_is_active():
        reasons.append("a torch.func transform or forward-mode AD is active")
    if in_onnx and not capability.onnx_export:
        reasons.append("the model is exported to ONNX, which has no operator for it")
    elif in_onnx and not capability.onnx_trace and torch.jit.is_tracing():
        reasons.append("torch.onnx.export(dynamo=False) translates it without grouped heads, and for new opsets alone")
    elif in_onnx and inputs.cu_seqlens_q is not None and capability.packed_sequences:
        reasons.append(
            "ONNX has no operator for packed sequences (cu_seqlens_q): export attention on a padded batch, with "
            "key_padding_mask"
        )
    return reasons

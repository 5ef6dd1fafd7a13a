"""torch's own `scaled_dot_product_attention`, for the calls that it serves exactly; `dispatch` calls it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha import masks
from fused_mha.backends.capability import Backend, Capability
from fused_mha.inputs import AttentionInputs, AttentionResult
from fused_mha.reference import append_virtual_keys


def _is_plain_causal(inputs: AttentionInputs) -> bool:
    """Whether torch's own is_causal flag says all that the masks say: top-left, and nothing else."""
    return (
        inputs.is_causal
        and inputs.attn_mask is None
        and inputs.key_padding_mask is None
        and inputs.window is None
        and inputs.bias_k is None
        and not inputs.add_zero_attn
        and (inputs.causal_alignment == "top_left" or inputs.query.shape[1] == inputs.key.shape[1])
    )


def _merged_mask(inputs: AttentionInputs, virtual_keys: int) -> Tensor | None:
    query = inputs.query
    # On the CPU the op takes an fp32 mask beside half queries: finfo(fp32).min would be -inf in fp16.
    is_half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.float16, torch.bfloat16)
    return masks.attention_bias(
        query.shape[1],
        inputs.key.shape[1],
        inputs.attn_mask,
        inputs.key_padding_mask,
        inputs.is_causal,
        inputs.causal_alignment,
        inputs.window,
        virtual_keys,
        torch.float32 if is_half_on_cpu else query.dtype,
        query.device,
    )


def _run(inputs: AttentionInputs) -> AttentionResult:
    is_causal = _is_plain_causal(inputs)
    key = append_virtual_keys(inputs.key, inputs.bias_k, inputs.add_zero_attn)
    value = append_virtual_keys(inputs.value, inputs.bias_v, inputs.add_zero_attn)
    output = F.scaled_dot_product_attention(
        inputs.query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if is_causal else _merged_mask(inputs, key.shape[1] - inputs.key.shape[1]),
        dropout_p=inputs.dropout_p,
        is_causal=is_causal,
        scale=inputs.scale,
        enable_gqa=key.shape[2] != inputs.query.shape[2],
    )
    return AttentionResult(output.transpose(1, 2), None, None)


def _notes(inputs: AttentionInputs) -> list[str]:
    masked = inputs.attn_mask is not None or inputs.key_padding_mask is not None or inputs.window is not None
    if masked or (inputs.is_causal and not _is_plain_causal(inputs)):
        return ["the masks of the call are merged into one additive tensor, (N|1, H|1, L|1, S)"]
    return []


BACKEND = Backend(
    name="sdpa",
    summary="torch.nn.functional.scaled_dot_product_attention",
    capability=Capability(weights=False, lse=False, transforms=False, empty_tensors=False, dropout_on_cpu=False),
    run=_run,
    notes=_notes,
)

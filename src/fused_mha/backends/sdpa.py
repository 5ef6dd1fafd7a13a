"""torch's own `scaled_dot_product_attention`, for the calls that it serves exactly; `dispatch` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha.backends import delegation
from fused_mha.backends.capability import Backend, Capability, Served, ServedModule
from fused_mha.core import masks
from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.memory import PLAIN_TYPES, aligned, unit_of
from fused_mha.core.modes import is_eager, is_plain, onnx_export_is_active
from fused_mha.core.reference import append_virtual_keys
from fused_mha.ops import schema
from fused_mha.ops.module import Call

torch_sdpa = F.scaled_dot_product_attention  # torch's own: `integrations.sdpa` may put another in its place


def _without_redundant_mask(inputs: AttentionInputs) -> AttentionInputs:
    """Drop an attn_mask that says no more than ``is_causal``, as `nn.Transformer` passes both.

    torch's op skips the hidden half under its flag alone. The mask's values are read only where that costs a hundredth
    of the attention and no graph: on the CPU, at once.
    """
    mask = inputs.attn_mask
    if mask is None or not inputs.is_causal or inputs.causal_alignment != "top_left":
        return inputs
    if mask.shape[:3] != (1, 1, inputs.query.shape[1]):  # the triangle of a mask that broadcasts over L is not its own
        return inputs
    if mask.device.type != "cpu" or not is_plain(mask) or bool(mask.tril().any()):
        return inputs
    return inputs._replace(attn_mask=None)


def _run(inputs: AttentionInputs) -> AttentionResult:
    inputs = _without_redundant_mask(inputs)
    query, S = inputs.query, inputs.key.shape[1]
    key = append_virtual_keys(inputs.key, inputs.bias_k, inputs.add_zero_attn)
    value = append_virtual_keys(inputs.value, inputs.bias_v, inputs.add_zero_attn)
    if query.device.type in _READ_16_BYTES and is_eager():
        query, key, value = map(_aligned, (query, key, value))
    mask = empty = None
    if inputs.needs_mask_tensor():
        # Beside half queries the op takes an fp32 mask (on the CPU, the only place where theirs come here):
        # finfo(fp32).min would be -inf in fp16.
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        mask = masks.attention_bias(
            query.shape[1],
            S,
            inputs.attn_mask,
            inputs.key_padding_mask,
            inputs.is_causal,
            inputs.causal_alignment,
            inputs.window,
            key.shape[1] - S,
            torch.float32 if is_half else query.dtype,
            query.device,
        )
        in_onnx = onnx_export_is_active()  # of what runs the exported model, nothing is known
        if mask is not None and (in_onnx or query.device.type not in _KNOW_EMPTY_ROWS) and key.shape[1] == S:
            mask, empty = masks.without_empty_rows(mask)
        if mask is not None and in_onnx:  # onnxruntime 1.32 takes a row for each query alone, below opset 25
            mask = mask.expand(-1, -1, query.shape[1], -1)
        mask = schema.own_mask(mask, query) if torch.is_grad_enabled() else mask
    result = _attend(query, key, value, mask, inputs.dropout_p, inputs.is_causal and mask is None, inputs.scale)
    if empty is None:
        return result
    return result._replace(output=result.output.masked_fill(empty.transpose(1, 2), 0.0))


# Devices whose kernels give zeros for rows that see no key; a virtual key is seen by all.
_KNOW_EMPTY_ROWS = ("cpu",)


# Devices whose kernels read 16 bytes at once where sizes allow it, without a look at every address and stride: from a
# wrong address, or a kernel is found missing (pytorch/pytorch#183484). Compilers copy such inputs.
_READ_16_BYTES = ("cuda",)


def _aligned(x: Tensor) -> Tensor:
    return aligned(x, unit_of(x)) if type(x) in PLAIN_TYPES else x


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> AttentionResult:
    # A branch, since the op takes no number for a flag: sizes are tensors under torch.jit.trace, and may be symbols
    # under torch.compile.
    is_grouped = True if key.shape[2] != query.shape[2] else False  # noqa: SIM210
    output = torch_sdpa(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=is_grouped,
    )
    return AttentionResult(output.transpose(1, 2), None, None)


def _served(inputs: AttentionInputs) -> Served | None:
    """The op itself for a call without masks and virtual keys, which needs nothing else."""
    if inputs.needs_mask_tensor() or inputs.bias_k is not None or inputs.add_zero_attn:
        return None
    if any(_aligned(x) is not x for x in inputs[:3]):
        return None
    dropout_p, is_causal, scale = inputs.dropout_p, inputs.is_causal, inputs.scale

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> AttentionResult:
        return _attend(query, key, value, None, dropout_p, is_causal, scale)

    return attend


def _serves_module(call: Call) -> ServedModule | None:
    """On CUDA, torch's operator of a whole module: the same products and the same SDPA in one call."""
    if not delegation.MODULE_RULE.holds(call):
        return None
    E, num_heads = call.query.shape[-1], call.num_heads

    def attend(tensors: Sequence[Any]) -> tuple[Tensor, None]:
        x, _, _, in_weight, _, _, _, in_bias, out_weight, out_bias = tensors[:_BIAS_K]
        output, _ = torch._native_multi_head_attention(
            x, x, x, E, num_heads, in_weight, in_bias, out_weight, out_bias, None, False
        )
        return output, None

    return attend


_BIAS_K = Call._fields.index("bias_k")


def _notes(inputs: AttentionInputs) -> list[str]:
    if _without_redundant_mask(inputs).needs_mask_tensor():
        return ["the masks of the call are merged into one additive tensor, (N|1, H|1, L|1, S)"]
    return []


BACKEND = Backend(
    name="sdpa",
    summary="torch.nn.functional.scaled_dot_product_attention",
    capability=Capability(
        weights=False,
        lse=False,
        score_options=False,
        packed_sequences=False,
        transforms=False,
        onnx_trace=False,
        empty_tensors=False,
        cpu_dropout=False,
        off_cpu_half_masks=False,
    ),
    run=_run,
    notes=_notes,
    served=_served,
    serves_module=_serves_module,
)

"""`attention_backward` from what kernels compute of it: sums over the batch and over what shares an element of a mask.

The back ends with kernels register this with the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops.schema import Arguments


def attention_backward(
    attention_gradients: Callable[..., tuple[Tensor, ...]],
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    stats: Tensor,
    mask_grad: bool,
    padding_grad: bool,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    """The operator of that name, by a kernel of the operator `attention_gradients`."""
    arguments = Arguments(*inputs)
    query, mask, padding = arguments.query, arguments.attn_mask, arguments.key_padding_mask
    for name, mask_of_grad, wanted in (("attn_mask", mask, mask_grad), ("key_padding_mask", padding, padding_grad)):
        if wanted and mask_of_grad is not None and not mask_of_grad.is_floating_point():
            raise RuntimeError(f"{name} must be floating for a gradient; got {mask_of_grad.dtype}")
    mask_grad, padding_grad = mask_grad and mask is not None, padding_grad and padding is not None
    has_rows = mask is not None and mask.shape[2] != 1
    *grads, grad_mask, grad_columns, grad_bias_k, grad_bias_v, grad_sinks, grad_distances = attention_gradients(
        torch.zeros_like(output) if grad_output is None else grad_output,
        grad_weights,
        grad_lse,
        output,
        stats,
        mask_grad and has_rows,
        padding_grad or (mask_grad and not has_rows),
        *inputs,
    )
    grad_attn_mask, grad_padding = query.new_empty((0,)), query.new_empty((0,))
    if mask_grad and mask is not None:
        if not has_rows:
            grad_mask = grad_columns.unsqueeze(2)  # [N, H, 1, S]
            for dim in (0, 1):
                grad_mask = summed(grad_mask, dim) if mask.shape[dim] == 1 else grad_mask
        grad_attn_mask = grad_mask.to(mask.dtype)
    if padding_grad and padding is not None:
        # Of one head the sum is what it sums, of which the gradient of a mask of keys may be a view too.
        grad_padding = summed(grad_columns, 1).squeeze(1).to(padding.dtype, copy=True)
    grad_biases = [
        query.new_empty((0,)) if bias is None else summed(grad, 0)[0].to(query.dtype)
        for bias, grad in ((arguments.bias_k, grad_bias_k), (arguments.bias_v, grad_bias_v))
    ]
    of_heads = (
        query.new_empty((0,)) if grad is None else grad
        for grad in of_sinks_and_slopes(arguments.sinks, arguments.alibi_slopes, grad_sinks, grad_distances)
    )
    return *grads, grad_attn_mask, grad_padding, *grad_biases, *of_heads


def of_sinks_and_slopes(
    sinks: Tensor | None, slopes: Tensor | None, grad_sinks: Tensor | None, grad_distances: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Their gradients, from those of each batch element, (N, H), and of the distances to each key, (N, H, S)."""
    of_sinks = of_slopes = None
    if sinks is not None and grad_sinks is not None:
        of_sinks = sinks.new_empty(sinks.shape).copy_(summed(grad_sinks, 0)[0])
    if slopes is not None and grad_distances is not None:
        of_slopes = slopes.new_empty(slopes.shape).copy_(summed(summed(grad_distances, 0), 2).flatten().neg())
    return of_sinks, of_slopes


def summed(x: Tensor, dim: int) -> Tensor:
    """The sum over one dimension, which stays with size 1, by pairs: torch's own order depends on the threads."""
    while (size := x.shape[dim]) > 1:
        half = (size + 1) // 2
        first = x.narrow(dim, 0, half).clone()
        first.narrow(dim, 0, size - half).add_(x.narrow(dim, half, size - half))
        x = first
    return x if size else x.sum(dim, keepdim=True)

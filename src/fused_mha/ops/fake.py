"""The shapes, dtypes and FLOPs of the operators' results, for tracing, compiling and counting without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops import schema
from fused_mha.ops.flop_counter import count_scores, register_flop_formula
from fused_mha.ops.schema import Arguments


@torch.library.register_fake(schema.attention)
def attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous results."""
    arguments = Arguments(*inputs)
    query = arguments.query
    N, L, H, _ = query.shape
    dtype = arguments.accumulator_dtype
    return (
        query.new_empty((N, L, H, arguments.value.shape[3])),
        query.new_empty(arguments.weights_shape),
        query.new_empty((N, H, L), dtype=dtype),
        query.new_empty((2, N, H, L), dtype=dtype),
    )


@torch.library.register_fake(schema.attention_backward)
def attention_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    stats: Tensor,
    mask_grad: bool,
    padding_grad: bool,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    """Contiguous gradients in the shapes and dtypes of what they belong to."""
    arguments = Arguments(*inputs)
    wanted = [
        arguments.query,
        arguments.key,
        arguments.value,
        arguments.attn_mask if mask_grad else None,
        arguments.key_padding_mask if padding_grad else None,
        arguments.bias_k,
        arguments.bias_v,
        arguments.sinks,
        arguments.alibi_slopes,
    ]
    return tuple(output.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in wanted)


@torch.library.register_fake(schema.dropout_mask)
def dropout_mask(seed: Tensor, shape: list[int], dropout_p: float) -> Tensor:
    """A bool tensor of that shape."""
    return seed.new_empty(shape, dtype=torch.bool)


@register_flop_formula(torch.ops.fused_mha.attention, get_raw=True)
def attention_flops(query: Tensor, key: Tensor, value: Tensor, *others: Any, **_: Any) -> int:
    """Two products, as torch counts its own: hidden keys count too, those of other packed sequences do not."""
    return 2 * _scores(query, key, others[7:9]) * (query.shape[3] + value.shape[3])


@register_flop_formula(torch.ops.fused_mha.attention_backward, get_raw=True)
def attention_backward_flops(*inputs: Any, **_: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    query, key, value, *others = inputs[7:]
    return 2 * _scores(query, key, others[7:9]) * (3 * query.shape[3] + 2 * value.shape[3])


def _scores(query: Tensor, key: Tensor, cu_seqlens: Sequence[Any]) -> int:
    N, L, H, _ = query.shape
    return H * count_scores(N, L, key.shape[1], *cu_seqlens)

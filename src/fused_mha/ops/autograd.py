"""The derivatives of `attention` and, by way of the reference, of its gradient.

`backends.cpu` records eager calls by the same two functions, without the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops import schema
from fused_mha.ops.fallback import reference_attention
from fused_mha.ops.schema import TENSORS, Arguments

_FIELDS = Arguments._fields
_DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "key_padding_mask", "bias_k", "bias_v")
_DIFFERENTIABLE += ("sinks", "alibi_slopes")
_OF_VALUES = {"value", "bias_v"}  # of which the weights and the log-sum-exp are no functions


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what `backward` needs."""
    result, weights, lse, stats = output
    ctx.set_materialize_grads(False)  # no gradient of the weights or of the log-sum-exp: no work for it
    needed = {name for name, is_needed in zip(_FIELDS, ctx.needs_input_grad, strict=False) if is_needed}
    ctx.mark_non_differentiable(stats, *((weights, lse) if needed <= _OF_VALUES else ()))
    query, key, value, attn_mask, key_padding_mask, *others = inputs[:TENSORS]
    masks = (schema.own_mask(mask, query) for mask in (attn_mask, key_padding_mask))
    ctx.save_for_backward(query, key, value, *masks, *others, result, stats)
    ctx.numbers = inputs[TENSORS:]


def backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    _: Any,
    attention_backward: Callable[..., tuple[Tensor, ...]] = schema.attention_backward,
) -> tuple[Tensor | None, ...]:
    """The gradients of `attention`'s arguments, by the operator `attention_backward` or what computes the same."""
    if grad_output is grad_weights is grad_lse is None:
        return (None,) * len(_FIELDS)
    *tensors, output, stats = ctx.saved_tensors
    needed = dict(zip(_FIELDS, ctx.needs_input_grad, strict=True))
    grads = attention_backward(
        grad_output,
        grad_weights,
        grad_lse,
        output,
        stats,
        needed["attn_mask"],
        needed["key_padding_mask"],
        *tensors,
        *ctx.numbers,
    )
    by_name: dict[str, Tensor] = dict(zip(_DIFFERENTIABLE, grads, strict=True))
    skipped = () if grad_output is not None else _OF_VALUES
    return tuple(by_name[name] if needed[name] and name not in skipped else None for name in _FIELDS)


torch.library.register_autograd(schema.attention, backward, setup_context=setup)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cotangents, rest = inputs[:3], inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*cotangents, *rest[:TENSORS])
    ctx.numbers = rest[TENSORS:]


def _double_backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiates the gradient of the reference, in which the drawn dropout mask is replayed."""
    with torch.enable_grad():
        tensors = [x if x is None or not x.is_floating_point() else _leaf(x) for x in ctx.saved_tensors]
        cotangents, inputs = tensors[:3], tensors[3:]
        arguments = Arguments.of(inputs, ctx.numbers)
        results = reference_attention(arguments)
        differentiated = [(y, g) for y, g in zip(results, cotangents, strict=True) if y is not None and g is not None]
        variables = [getattr(arguments, name) for name in _DIFFERENTIABLE]
        wanted = [i for i, g in enumerate(grads_of_grads) if g is not None and variables[i] is not None]
        if not wanted or not differentiated:
            return (None,) * (7 + len(_FIELDS))
        gradients = torch.autograd.grad(
            [y for y, _ in differentiated],
            [variables[i] for i in wanted],
            [g for _, g in differentiated],
            allow_unused=True,
            create_graph=True,
        )
    used = [(x, grads_of_grads[i]) for x, i in zip(gradients, wanted, strict=True) if x is not None and x.requires_grad]
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    second = torch.autograd.grad(
        [x for x, _ in used],
        leaves,
        [g for _, g in used],
        allow_unused=True,
        create_graph=torch.is_grad_enabled(),
    )
    by_leaf = dict(zip(map(id, leaves), second, strict=True))
    found = [None if x is None else by_leaf.get(id(x)) for x in tensors]
    return (*found[:3], None, None, None, None, *found[3:], *(None,) * (len(_FIELDS) - TENSORS))


def _leaf(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


torch.library.register_autograd(schema.attention_backward, _double_backward, setup_context=_setup_backward)

"""Eager calls without the dispatcher, which costs more than they do: `fused_mha.plans` has one `Kept` for each kind.

What it is given has been checked to be plain tensors of one kind, which no mode, transform or compiler sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_mha.backends.arguments import arguments_of, draw_seed
from fused_mha.backends.triton.launch import Plan
from fused_mha.inputs import AttentionInputs, AttentionResult
from fused_mha.modes import may_skip_dispatcher
from fused_mha.ops import schema


class Kept:
    """All calls whose tensors have the sizes, strides and so on of these inputs, and their flags."""

    def __init__(self, inputs: AttentionInputs) -> None:
        arguments = arguments_of(inputs, _no_seed)
        self.numbers = arguments[8:]
        self.plan = Plan(arguments)
        self._dropout_p, self._device = inputs.dropout_p, inputs.query.device
        self.returns_output_alone = not inputs.need_weights and not inputs.return_lse
        self._return_lse = inputs.return_lse

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
    ) -> AttentionResult:
        """Attention; `plans` sees to it that no mask and no bias needs a gradient."""
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[None, None]
        seed = draw_seed(self._dropout_p, self._device) if self._dropout_p else None
        tensors = (query, key, value, attn_mask, key_padding_mask, bias_k, bias_v, seed)
        if not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad):
            output, weights, lse, _ = self.plan.forward(tensors)
        elif self.returns_output_alone:
            return AttentionResult(_Attention.apply(self, *tensors), None, None)
        else:
            output, weights, lse = _Attention.apply(self, *tensors)
        return AttentionResult(output, weights, lse if self._return_lse else None)


def _no_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """In the place of one that torch's generator would draw."""
    return torch.empty((2,), dtype=torch.int64, device=device) if dropout_p else None


class _Attention(torch.autograd.Function):
    """The operators `attention` and `attention_backward` of such a call."""

    @staticmethod
    def forward(ctx: Any, kept: Kept, *tensors: Tensor | None) -> Any:
        output, weights, lse, stats = kept.plan.forward(tensors)
        query, key, value, attn_mask, key_padding_mask, *others = tensors
        assert query is not None
        if attn_mask is not None:
            attn_mask = schema.own_mask(attn_mask, query)
        if key_padding_mask is not None:
            key_padding_mask = schema.own_mask(key_padding_mask, query)
        ctx.save_for_backward(query, key, value, attn_mask, key_padding_mask, *others, output, stats)
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        if kept.returns_output_alone:
            return output
        _, of_query, of_key, *_ = ctx.needs_input_grad
        if not (of_query or of_key):  # of values alone, neither is a function
            ctx.mark_non_differentiable(*(x for x in (weights, lse) if x is not None))
        return output, weights, lse

    @staticmethod
    def backward(ctx: Any, *of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_weights, grad_lse = of_results if len(of_results) == 3 else (*of_results, None, None)
        if grad_output is grad_weights is grad_lse is None:
            return (None,) * 9
        *tensors, output, stats = ctx.saved_tensors
        grads = (grad_output, grad_weights, grad_lse)
        if not may_skip_dispatcher(grads):
            numbers = ctx.kept.numbers
            found = schema.attention_backward(*grads, output, stats, False, False, *tensors, *numbers)
        else:
            grads = (torch.zeros_like(output) if grad_output is None else grad_output, grad_weights, grad_lse)
            found = ctx.kept.plan.gradients(tuple(tensors), grads, output, stats, False, False)
        _, of_query, of_key, of_value, *_ = ctx.needs_input_grad
        return (
            None,
            found[0] if of_query else None,
            found[1] if of_key else None,
            found[2] if of_value and grad_output is not None else None,  # of which the weights are no function
            *(None,) * 5,
        )

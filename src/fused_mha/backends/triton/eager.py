"""Eager calls without the dispatcher, which costs more than they do: `core.plans` has one `Kept` for each kind of call.

What a call is given has been checked to be plain tensors of one kind, which no dispatch mode, transform or compiler
sees. What its backward is given has not: hooks and assignments to `data` change what was saved.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fused_mha.backends.arguments import arguments_of, draw_seed
from fused_mha.backends.triton.launch import Plan, plan_of, results_of
from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.memory import Recent, memory_of, memory_of_each
from fused_mha.core.modes import is_eager, may_skip_dispatcher
from fused_mha.ops import gradients, schema
from fused_mha.ops.schema import TENSORS, Arguments


class Kept:
    """All calls whose tensors have the sizes, strides and so on of these inputs, and their flags."""

    def __init__(self, inputs: AttentionInputs) -> None:
        arguments = arguments_of(inputs, _no_seed)
        self.numbers = arguments[TENSORS:]
        self.plan = Plan(arguments)
        self._dropout_p, self._device = inputs.dropout_p, inputs.query.device
        self._memory = [None if x is None else memory_of(x) for x in arguments[:TENSORS]]
        self._output, _, _, self._stats = results_of(arguments)
        self.returns_output_alone = not inputs.need_weights and not inputs.return_lse
        self._return_lse = inputs.return_lse
        # Of backwards, by the gradients that they are given.
        self._recent: defaultdict[tuple[bool, ...], Recent[tuple[Plan, bool]]] = defaultdict(Recent)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> AttentionResult:
        """Attention; `plans` sees to it that no mask and no bias needs a gradient."""
        seed = draw_seed(self._dropout_p, self._device) if self._dropout_p else None
        others, offsets = (attn_mask, key_padding_mask, bias_k, bias_v, seed), (cu_seqlens_q, cu_seqlens_k)
        of_heads = () if sinks is None and alibi_slopes is None else (sinks, alibi_slopes)
        learns = query.requires_grad or key.requires_grad or value.requires_grad or _any_learns(of_heads)
        if not torch.is_grad_enabled() or not learns:
            output, weights, lse, _ = self.plan.forward((query, key, value, *others, sinks, alibi_slopes, *offsets))
        elif self.returns_output_alone:
            return AttentionResult(_record(self, (*others, *offsets), query, key, value, *of_heads), None, None)
        else:
            output, weights, lse = _record(self, (*others, *offsets), query, key, value, *of_heads)
        return AttentionResult(output, weights, lse if self._return_lse else None)

    def plan_of_backward(self, saved: tuple[Any, ...], grads: tuple[Any, ...]) -> tuple[Plan, bool] | None:
        """That of a backward, by what was saved for it and is given to it, and whether it reads these as they are.

        None where the general way serves it.
        """
        if torch.is_grad_enabled() or not is_eager():
            return None
        recent = self._recent[grads[0] is None, grads[1] is None, grads[2] is None]
        given = [x for x in (*saved, *grads) if x is not None]
        found = recent.find(given)
        if found is None and may_skip_dispatcher(grads) and (plan := self._plan_of_saved(*saved)) is not None:
            found = plan, plan.reads(grads, *saved[TENSORS:])
            recent.note(given, found)
        return found

    def _plan_of_saved(self, *saved: Any) -> Plan | None:
        """The forward's, if the memory is the same. The copy of a mask may have other strides than the caller's."""
        *tensors, output, stats = saved
        memory = memory_of_each((*tensors, output, stats), self._device.type)
        pairs = ((output, self._output), (stats, self._stats))
        if memory is None or any((x.shape, x.dtype, x.device) != wanted for x, wanted in pairs):
            return None
        del memory[TENSORS:]
        if memory == self._memory:
            return self.plan
        is_alike = _without_layout_of_masks(memory) == _without_layout_of_masks(self._memory)
        return plan_of(Arguments.of(tensors, self.numbers)) if is_alike else None


def _any_learns(of_heads: tuple[Tensor | None, ...]) -> bool:
    return any(x is not None and x.requires_grad for x in of_heads)


def _without_layout_of_masks(memory: list[Any]) -> list[Any]:
    return [x if x is None or i not in _MASKS else (x[0], *x[2:4]) for i, x in enumerate(memory)]


def _no_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """In the place of one that torch's generator would draw."""
    return torch.empty((2,), dtype=torch.int64, device=device) if dropout_p else None


class _Attention(torch.autograd.Function):
    """The operators `attention` and `attention_backward` of such a call; the fewer inputs, the less it costs.

    `of_heads` are the sinks and the slopes, or nothing where there are none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kept: Kept,
        others: tuple[Tensor | None, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *of_heads: Tensor | None,
    ) -> Any:
        attn_mask, key_padding_mask, *biases_and_seed = others[:_OFFSETS]
        rest = (*biases_and_seed, *(of_heads or (None, None)), *others[_OFFSETS:])
        output, weights, lse, stats = kept.plan.forward((query, key, value, attn_mask, key_padding_mask, *rest))
        if attn_mask is not None:
            attn_mask = schema.own_mask(attn_mask, query)
        if key_padding_mask is not None:
            key_padding_mask = schema.own_mask(key_padding_mask, query)
        ctx.save_for_backward(query, key, value, attn_mask, key_padding_mask, *rest, output, stats)
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        if kept.returns_output_alone:
            return output
        if not (
            query.requires_grad or key.requires_grad or _any_learns(of_heads)
        ):  # of values alone, neither is a function
            ctx.mark_non_differentiable(*(x for x in (weights, lse) if x is not None))
        return output, weights, lse

    @staticmethod
    def backward(ctx: Any, *of_results: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = of_results if len(of_results) == _RESULTS else (*of_results, None, None)
        if grads[0] is grads[1] is grads[2] is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        *tensors, output, stats = saved
        has_output = grads[0] is not None
        _, _, of_query, of_key, of_value, *of_heads = ctx.needs_input_grad
        known = ctx.kept.plan_of_backward(saved, grads)
        if known is not None:
            plan, are_rows = known
            grads = grads if has_output else (torch.zeros_like(output), *grads[1:])
            of_slopes = bool(of_heads) and of_heads[1]
            found = plan.gradients(tensors, grads, output, stats, False, False, None, of_slopes, are_rows)
            found_of_heads = (
                gradients.of_sinks_and_slopes(*tensors[_SINKS : _SINKS + 2], *found[-2:]) if of_heads else ()
            )
        else:
            numbers = ctx.kept.numbers
            found = schema.attention_backward(*grads, output, stats, False, False, *tensors, *numbers)
            found_of_heads = found[-2:]
        return (
            None,
            None,
            found[0] if of_query else None,
            found[1] if of_key else None,
            found[2] if of_value and has_output else None,  # of which weights and log-sum-exp are no functions
            *(x if wanted else None for x, wanted in zip(found_of_heads, of_heads, strict=False)),
        )


_MASKS, _SINKS = (3, 4), 8  # of the tensors of a call; slopes follow
_OFFSETS = 5  # where those of packed sequences are in what `others` holds of them
_RESULTS = 3  # output, weights and log-sum-exp, or the output alone
# Without what `Function.apply` does for transforms: of those, there is none here.
_base: Any = super(torch.autograd.Function, _Attention)
_record = _base.apply

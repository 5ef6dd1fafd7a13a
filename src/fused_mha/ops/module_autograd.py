"""The derivatives of `multi_head_attention`, and both of its operators by smaller ones where there is no kernel.

`backends.cpu` records eager calls by `setup` and `backward`, without the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops import schema
from fused_mha.ops.module import GRADIENTS, TENSORS, Call, multi_head_attention, multi_head_attention_backward
from fused_mha.ops.product import product

_OF_OUTPUT = (Call._fields.index("out_weight"), Call._fields.index("out_bias"))


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what `backward` needs."""
    _, weights, *kept = output
    reaches_weights = any(ctx.needs_input_grad[i] for i in range(GRADIENTS) if i not in _OF_OUTPUT)
    ctx.mark_non_differentiable(*kept, *(() if reaches_weights else (weights,)))
    ctx.set_materialize_grads(False)  # no gradient of the weights: no work for it
    ctx.save_for_backward(*inputs[:TENSORS], *kept)
    ctx.numbers = inputs[TENSORS:-1]


def backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    *_: Any,
    kernel: Callable[..., tuple[Tensor, ...]] = multi_head_attention_backward,
) -> tuple[Tensor | None, ...]:
    """The gradients of the operator's arguments; differentiable again if autograd asks for that."""
    none = (None,) * (len(Call._fields) + 1 - GRADIENTS)
    saved = ctx.saved_tensors  # which may be unpacked once only
    call = Call.of((*saved[:TENSORS], *ctx.numbers))
    if grad_output is grad_weights is None:
        return (None,) * (GRADIENTS + len(none))
    wanted = [i for i in _wanted(call, ctx.needs_input_grad) if i not in _OF_OUTPUT or grad_output is not None]
    if torch.is_grad_enabled():
        return *_gradients(call, wanted, grad_output, grad_weights, create_graph=True), *none
    flags = sum(1 << i for i in wanted)
    found = kernel(grad_output, grad_weights, *saved[TENSORS:], *call, flags)
    return *(x if i in wanted else None for i, x in enumerate(found)), *none


torch.library.register_autograd(multi_head_attention, backward, setup_context=setup)


def _wanted(call: Call, needs: tuple[bool, ...]) -> list[int]:
    """Indices of the tensors that get a gradient: of inputs that are one tensor, the first gets all of it."""
    wanted = [i for i in range(3, GRADIENTS) if needs[i]]
    return [first for first, end in call.ranges() if any(needs[first:end])] + wanted


def _composed(call: Call) -> tuple[Tensor, Tensor]:
    """Output and attention weights by the operators `product` and `attention`."""
    E, H = call.out_weight.shape[0], call.num_heads
    in_weights = call[4:7] if call.in_weight is None else call.in_weight.chunk(3)
    biases = (None,) * 3 if call.in_bias is None else call.in_bias.chunk(3)
    given = (call.query, call.key, call.value)
    inputs = [call.sequences(given[first]) for first, end in call.ranges() for _ in range(first, end)]
    projected = []
    for x, weight, bias in zip(inputs, in_weights, biases, strict=True):
        rows = product(x.reshape(-1, x.shape[2]), weight, bias, False, True)
        projected.append(rows.view(*x.shape[:2], H, E // H))
    padding = call.key_padding_mask
    heads, weights, _, _ = schema.attention(
        *projected,
        call.attn_mask,
        padding.unsqueeze(0) if padding is not None and padding.dim() == 1 else padding,
        None if call.bias_k is None else call.bias_k.reshape(H, -1),
        None if call.bias_v is None else call.bias_v.reshape(H, -1),
        call.seed,
        None,
        0 if call.is_causal else None,
        call.add_zero_attn,
        call.dropout_p,
        call.scale,
        call.need_weights,
        call.average_attn_weights,
    )
    output = product(heads.reshape(-1, E), call.out_weight, call.out_bias, False, True).view(*heads.shape[:2], E)
    if call.query.dim() == 2:
        return output.squeeze(0), weights.squeeze(0) if call.need_weights else weights
    return output if call.batch_first else output.transpose(0, 1), weights


def _gradients(
    call: Call, wanted: list[int], grad_output: Tensor | None, grad_weights: Tensor | None, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, in their places; as functions of everything with ``create_graph``."""
    tensors: tuple[Any, ...] = call[:TENSORS]
    with torch.enable_grad():
        leaves: list[Any] = [
            x if x is None or not (i in wanted or x.requires_grad) else _leaf(x, create_graph)
            for i, x in enumerate(tensors)
        ]
        results = zip(_composed(Call.of((*leaves, *call[TENSORS:]))), (grad_output, grad_weights), strict=True)
        differentiated = [(y, g) for y, g in results if g is not None]
    found = torch.autograd.grad(
        [y for y, _ in differentiated],
        [leaves[i] for i in wanted],
        [g for _, g in differentiated],
        allow_unused=True,
        create_graph=create_graph,
    )
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(map(by_index.get, range(GRADIENTS)))


def _leaf(x: Tensor, keeps_history: bool) -> Tensor:
    """A tensor to differentiate by, which no other argument is."""
    return x.view_as(x) if keeps_history and x.requires_grad else x.detach().requires_grad_()


@torch.library.impl(schema.LIBRARY, "multi_head_attention", "CompositeExplicitAutograd")
def _fallback(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, keep = arguments
    call = Call.of(fields)
    output, weights = _composed(call)
    return output.contiguous(), weights.contiguous(), *call.new_kept(keep)  # the backward computes again


@torch.library.impl(schema.LIBRARY, "multi_head_attention_backward", "CompositeExplicitAutograd")
def _fallback_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    projections: Tensor,
    heads: Tensor,
    stats: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *fields, flags = rest
    call = Call.of(fields)
    wanted = [i for i in range(GRADIENTS) if flags >> i & 1]
    found = _gradients(call, wanted, grad_output, grad_weights, create_graph=False)
    return tuple(
        projections.new_empty((0,)) if i not in wanted else torch.zeros_like(given) if x is None else x.contiguous()
        for i, (x, given) in enumerate(zip(found, fields[:GRADIENTS], strict=True))
    )

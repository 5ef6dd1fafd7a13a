"""The derivatives of `multi_head_attention`, and both of its operators by smaller ones where there is no kernel.

`backends.cpu` records eager calls by `setup` and `backward`, without the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fused_mha.core import masks
from fused_mha.ops import schema
from fused_mha.ops.module import GRADIENTS, TENSORS, Call, multi_head_attention, multi_head_attention_backward
from fused_mha.ops.product import product

_NAMES = Call._fields[:GRADIENTS]
_MASKS = (Call._fields.index("attn_mask"), Call._fields.index("key_padding_mask"))
# By which gradients the values of a tensor are read; those of the biases of linear maps by none.
_BIASES = ("in_bias", "out_bias")
_INPUTS, _WEIGHTS = ("query", "key", "value"), ("query_weight", "key_weight", "value_weight")
_READ_FOR = {
    **{x: ("in_weight", weight) for x, weight in zip(_INPUTS, _WEIGHTS, strict=True)},
    **{weight: (x,) for x, weight in zip(_INPUTS, _WEIGHTS, strict=True)},
    "in_weight": _INPUTS,
    **dict.fromkeys(_BIASES, ()),
}
_OF_OUTPUT = {"out_weight", "out_bias"}  # nothing before them needs their gradients, and the attention weights none
_OF_VALUES = {"value", "value_weight", "bias_v"}  # which the attention weights do not depend on either


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Save what `backward` reads; there may be None in the place of no weights."""
    _, weights, *kept = output
    needed = {name for name, is_needed in zip(_NAMES, ctx.needs_input_grad, strict=False) if is_needed}
    before_heads = needed - _OF_OUTPUT
    others = () if weights is None or before_heads - _OF_VALUES else (weights,)
    ctx.mark_non_differentiable(*kept, *others)
    ctx.set_materialize_grads(False)  # no gradient of the weights: no work for it
    saved, ctx.unread = list(inputs[:TENSORS]), []
    for i, (name, x) in enumerate(zip(Call._fields, saved, strict=False)):
        if x is not None and before_heads.isdisjoint(_READ_FOR.get(name, before_heads)):
            saved[i] = None if name in _BIASES else x.new_empty(1).expand(x.shape)  # of which the shape alone is read
            ctx.unread.append((i, x, None if x.is_inference() else x._version))
    for i in _MASKS:
        saved[i] = schema.own_mask(inputs[i], inputs[0])
    ctx.save_for_backward(*saved, *kept)
    *ctx.numbers, ctx.keeps = inputs[TENSORS:]


def backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    *_: Any,
    kernel: Callable[..., tuple[Tensor | None, ...] | None] = multi_head_attention_backward,
) -> tuple[Tensor | None, ...]:
    """The gradients of the operator's arguments; differentiable again if autograd asks for that.

    The kernel returns None where it cannot read what was saved.
    """
    none = (None,) * (len(Call._fields) + 1 - GRADIENTS)
    saved = ctx.saved_tensors  # which may be unpacked once only
    if grad_output is grad_weights is None:
        return (None,) * (GRADIENTS + len(none))
    skipped = _OF_OUTPUT | _OF_VALUES if grad_output is None else ()
    wanted = [i for i, name in enumerate(_NAMES) if ctx.needs_input_grad[i] and name not in skipped]
    found = None
    if not torch.is_grad_enabled() and ctx.keeps:  # `keep` may be of an export where no gradient was wanted
        flags = sum(1 << i for i in wanted)
        found = kernel(grad_output, grad_weights, *saved[TENSORS:], *saved[:TENSORS], *ctx.numbers, flags)
    if found is None:
        tensors = _with_unread(ctx, saved[:TENSORS])
        call = Call.of((*tensors, *ctx.numbers))
        return *_gradients(call, wanted, grad_output, grad_weights, torch.is_grad_enabled()), *none
    return *(x if i in wanted else None for i, x in enumerate(found)), *none


torch.library.register_autograd(multi_head_attention, backward, setup_context=setup)


def _with_unread(ctx: Any, saved: Iterable[Tensor | None]) -> list[Tensor | None]:
    """All tensors, for what reads more values than the kernel; autograd's own check holds for those not saved too."""
    tensors = [*saved]
    for i, x, version in ctx.unread:
        if version is not None and x._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{Call._fields[i]}, of shape {tuple(x.shape)}, is at version {x._version}; expected version {version}"
            )
        tensors[i] = x
    return tensors


def _composed(call: Call) -> tuple[Tensor, Tensor]:
    """Output and attention weights by the operators `product` and `attention`."""
    E, H = call.out_weight.shape[0], call.num_heads
    in_weights = call[4:7] if call.in_weight is None else call.in_weight.chunk(3)
    biases = (None,) * 3 if call.in_bias is None else call.in_bias.chunk(3)
    padding = call.key_padding_mask
    padding = padding.unsqueeze(0) if padding is not None and padding.dim() == 1 else padding
    sequences = [*map(call.sequences, call.inputs())]
    if padding is not None:  # 0 * NaN = NaN would reach the gradients of the weights
        hidden = masks.hidden_keys(padding).unsqueeze(-1)
        for i in range(call.key is not None, 3):
            sequences[i] = masks.finite_where(hidden, sequences[i])
    projected = []
    for x, weight, bias in zip(sequences, in_weights, biases, strict=True):
        rows = product(x.reshape(-1, x.shape[2]), weight, bias, False, True)
        projected.append(rows.view(*x.shape[:2], H, E // H))
    heads, weights, _, _ = schema.attention(
        *projected,
        call.attn_mask,
        padding,
        None if call.bias_k is None else call.bias_k.reshape(H, -1),
        None if call.bias_v is None else call.bias_v.reshape(H, -1),
        call.seed,
        None,
        None,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        None,
        0 if call.is_causal else None,
        False,
        call.add_zero_attn,
        call.dropout_p,
        call.scale,
        None,
        call.need_weights,
        call.average_attn_weights,
        None,
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
        projections.new_zeros(shape if i in wanted else (0,)) if x is None else x.contiguous()
        for i, (x, shape) in enumerate(zip(found, call.gradient_shapes(), strict=True))
    )

"""The operator `transform_heads`, Q/K norm and rotation of heads in one pass, and its gradient.

`module.heads` calls it by way of `backends.cpu`, which records eager calls by `setup` and `backward`. `core.heads` has
the same in PyTorch: graphs on other devices run it, and second derivatives are its.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mha.core import heads
from fused_mha.core.heads import QK_NORMS, HeadNorm, Rotation
from fused_mha.ops import schema
from fused_mha.ops.gradients import summed

MOST_HEAD_SIZE = 1024  # as csrc/c_api.h has it
NORMS = {kind: i + 1 for i, kind in enumerate(QK_NORMS)}  # 0 is none
_POSITIONS = 32  # of a part of the gradients of weight and bias, as csrc/c_api.h has it
_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, int norm, bool interleaved, float eps"
_TENSORS, _LEARN = 5, 3

schema.LIBRARY.define(f"transform_heads({_INPUTS}) -> Tensor", tags=schema.TAGS)
schema.LIBRARY.define(f"transform_heads_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=schema.TAGS)
transform_heads = torch.ops.fused_mha.transform_heads.default
transform_heads_backward = torch.ops.fused_mha.transform_heads_backward.default


def _by_torch(x: Tensor, *rest: Any) -> Tensor:
    weight, bias, cos, sin, norm, interleaved, _ = rest
    return heads.transform_heads(
        x,
        None if norm == 0 else HeadNorm(QK_NORMS[norm - 1], weight, bias),
        None if cos is None else Rotation(cos, sin, "interleaved" if interleaved else "half"),
    )


@torch.library.register_fake(transform_heads)
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(transform_heads_backward)
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = (x.shape[0] * x.shape[1] + _POSITIONS - 1) // _POSITIONS
    shapes = [(0,) if t is None else (parts, x.shape[3]) for t in (weight, bias)]
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.impl(schema.LIBRARY, "transform_heads", "CompositeExplicitAutograd")
def _fallback(*inputs: Any) -> Tensor:
    return _by_torch(*inputs).contiguous()


@torch.library.impl(schema.LIBRARY, "transform_heads_backward", "CompositeExplicitAutograd")
def _fallback_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    grad_x, *of_norm = _gradients(grad, inputs, [x is not None for x in inputs[:_LEARN]], create_graph=False)
    _, *parts = _fake_backward(grad, *inputs)
    for x, part in zip(of_norm, parts, strict=True):
        if x is not None:  # the whole sum in the first part
            part.zero_()[:1] = x
    return grad_x.contiguous(), *parts


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what `backward` needs."""
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]


def backward(
    ctx: Any, grad: Tensor, kernel: Callable[..., tuple[Tensor, ...]] = transform_heads_backward
) -> tuple[Tensor | None, ...]:
    """The gradients of `transform_heads`'s arguments, by the operator or what computes the same."""
    inputs = (*ctx.saved_tensors, *ctx.numbers)
    wanted = ctx.needs_input_grad[:_LEARN]
    if torch.is_grad_enabled():  # for second derivatives
        return *_gradients(grad, inputs, wanted, create_graph=True), *(None,) * (len(inputs) - _LEARN)
    grad_x, *parts = kernel(grad, *inputs)
    of_norm = [
        summed(part, 0)[0].to(parameter.dtype) if is_wanted else None
        for part, parameter, is_wanted in zip(parts, inputs[1:_LEARN], wanted[1:], strict=True)
    ]
    return grad_x if wanted[0] else None, *of_norm, *(None,) * (len(inputs) - _LEARN)


torch.library.register_autograd(transform_heads, backward, setup_context=setup)


def _gradients(grad: Tensor, inputs: tuple[Any, ...], wanted: Any, create_graph: bool) -> list[Any]:
    with torch.enable_grad():
        leaves = [
            x if not is_wanted else x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
            for x, is_wanted in zip(inputs, wanted, strict=False)
        ]
        result = _by_torch(*leaves, *inputs[_LEARN:])
    found = iter(
        torch.autograd.grad(
            result,
            [x for x, is_wanted in zip(leaves, wanted, strict=True) if is_wanted],
            grad,
            create_graph=create_graph,
        )
    )
    return [next(found) if is_wanted else None for is_wanted in wanted]

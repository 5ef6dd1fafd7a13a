"""The operator `product`, C = A B + bias of whole matrices, whose derivatives are products again. `linear` calls
it, and `backends.cpu` records eager calls by `setup` and `backward`.

`left` is A, (M, K), or A^T, (K, M), where ``left_is_transposed``; `right` is B, (K, N), or B^T likewise. So a linear
layer and its gradients take the tensors as they lie: y = x W^T, dx = dy W, dW = dy^T x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops import schema
from fused_mha.ops.flop_counter import register_flop_formula

schema.LIBRARY.define(
    "product(Tensor left, Tensor right, Tensor? bias, bool left_is_transposed, bool right_is_transposed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
product = torch.ops.fused_mha.product.default


def _sizes(left: Tensor, right: Tensor, left_is_transposed: bool, right_is_transposed: bool) -> tuple[Any, Any, Any]:
    M, K = left.shape[::-1] if left_is_transposed else left.shape
    return M, right.shape[0 if right_is_transposed else 1], K


@torch.library.register_fake(product)
def _fake(
    left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool
) -> Tensor:
    M, N, _ = _sizes(left, right, left_is_transposed, right_is_transposed)
    return left.new_empty((M, N))


@torch.library.impl(schema.LIBRARY, "product", "CompositeExplicitAutograd")
def _fallback(
    left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool
) -> Tensor:
    result = (left.t() if left_is_transposed else left) @ (right.t() if right_is_transposed else right)
    return result if bias is None else result + bias


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what `backward` needs."""
    left, right, _, *ctx.transposed = inputs
    ctx.set_materialize_grads(False)  # attention weights give the projection of the values none: no work for it
    ctx.save_for_backward(left, right)


def backward(
    ctx: Any, grad: Tensor | None, multiply: Callable[..., Tensor] = product
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """The gradients of `product`'s arguments, by the operator itself or what computes the same."""
    if grad is None:
        return None, None, None, None, None
    left, right = ctx.saved_tensors
    needs_left, needs_right, needs_bias = ctx.needs_input_grad[:3]
    left_is_transposed, right_is_transposed = ctx.transposed
    grad_left = grad_right = None
    if needs_left and left_is_transposed:
        grad_left = multiply(right, grad, None, right_is_transposed, True)  # dA^T = B dC^T
    elif needs_left:
        grad_left = multiply(grad, right, None, False, not right_is_transposed)  # dA = dC B^T
    if needs_right and right_is_transposed:
        grad_right = multiply(grad, left, None, True, left_is_transposed)  # dB^T = dC^T A
    elif needs_right:
        grad_right = multiply(left, grad, None, not left_is_transposed, False)  # dB = A^T dC
    return grad_left, grad_right, grad.sum(0) if needs_bias else None, None, None


torch.library.register_autograd(product, backward, setup_context=setup)


@register_flop_formula(torch.ops.fused_mha.product, get_raw=True)
def _flops(
    left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool, **_: Any
) -> int:
    M, N, K = _sizes(left, right, left_is_transposed, right_is_transposed)
    return 2 * M * N * K

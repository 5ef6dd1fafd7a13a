"""The fused CPU core: loads the library, registers its kernels with the operators, and serves `dispatch`."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from fused_mha.backends import native
from fused_mha.backends.capability import Backend, Capability
from fused_mha.inputs import AttentionInputs, AttentionResult
from fused_mha.modes import is_eager
from fused_mha.ops import autograd, schema
from fused_mha.ops import product as product_operator
from fused_mha.ops.schema import Arguments

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of inputs, and of masks that are not bool
LIBRARY = native.load(sys.modules[__name__.partition(".")[0]].__path__)

if LIBRARY is None:
    warnings.warn(
        "fused_mha was installed without its C++ library, for want of a compiler that could build it: it works, on "
        "torch's own operators, and slower. To get the library, install GCC 11, Clang 14 or newer, and then fused_mha "
        "again by `pip install --force-reinstall --no-deps --no-cache-dir` (pip's cache may hold one without it).",
        stacklevel=2,
    )


def _band(inputs: AttentionInputs) -> tuple[int | None, int | None]:
    """The first and the last key that query i sees, less i; None is no limit. `masks.outside_band` draws the same."""
    left, right = (None if side is None else min(side, native.FAR) for side in inputs.window or (None, None))
    if inputs.is_causal:
        right = 0
    diagonal = inputs.key.shape[1] - inputs.query.shape[1] if inputs.causal_alignment == "bottom_right" else 0
    return None if left is None else diagonal - left, None if right is None else diagonal + right


def last_contiguous(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, as the library takes it; a copy only where it must be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of a call's dropout, from torch's generator; None where nothing is dropped."""
    if not dropout_p:
        return None
    whole = torch.iinfo(torch.int64)
    return torch.randint(whole.min, whole.max, (2,), dtype=torch.int64, device=device)


def _run(inputs: AttentionInputs) -> AttentionResult:
    arguments = Arguments(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.attn_mask,
        inputs.key_padding_mask,
        inputs.bias_k,
        inputs.bias_v,
        draw_seed(inputs.dropout_p, inputs.query.device),
        *_band(inputs),
        inputs.add_zero_attn,
        float(inputs.dropout_p),
        float(inputs.scale),
        inputs.need_weights,
        inputs.average_attn_weights,
    )
    if not is_eager() or any(x is not None and (type(x) is not Tensor or x.is_neg()) for x in arguments[:7]):
        output, weights, lse, _ = schema.attention(*arguments)
    elif is_recorded(*arguments[:7]):
        output, weights, lse, _ = _Attention.apply(*arguments)
    else:
        assert LIBRARY is not None
        output, weights, lse, _ = LIBRARY.forward(_contiguous(arguments), inputs.return_lse, return_stats=False)
    return AttentionResult(output, weights if inputs.need_weights else None, lse if inputs.return_lse else None)


def _contiguous(arguments: Arguments) -> Arguments:
    return Arguments.of((None if x is None else last_contiguous(x) for x in arguments[:7]), arguments[7:])


def _operands(*inputs: Any) -> Arguments:
    """The operators' arguments, which anyone may call them with; what else is wrong the library finds."""
    for name, x in zip(Arguments._fields, inputs[:8], strict=False):
        if x is not None and (x.dim() > 4 or (x.dim() < 4 and name in ("query", "key", "value", "attn_mask"))):
            raise RuntimeError(f"{name} has a wrong number of dimensions; got shape {tuple(x.shape)}")
    return _contiguous(Arguments(*inputs))


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert LIBRARY is not None
    return LIBRARY.forward(_operands(*inputs), return_lse=True, return_stats=True)


def sum_over_batch(x: Tensor) -> Tensor:
    """The sum over the first dimension, the same for any number of threads."""
    return _sum(x, 0)[0]


def _sum(x: Tensor, dim: int) -> Tensor:
    """The sum over one dimension, which stays with size 1, by pairs: torch's own order depends on the threads."""
    while (size := x.shape[dim]) > 1:
        half = (size + 1) // 2
        first = x.narrow(dim, 0, half).clone()
        first.narrow(dim, 0, size - half).add_(x.narrow(dim, half, size - half))
        x = first
    return x if size else x.sum(dim, keepdim=True)


def _backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    stats: Tensor,
    mask_grad: bool,
    padding_grad: bool,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    assert LIBRARY is not None
    arguments = _operands(*inputs)
    query, mask, padding = arguments.query, arguments.attn_mask, arguments.key_padding_mask
    for name, mask_of_grad, wanted in (("attn_mask", mask, mask_grad), ("key_padding_mask", padding, padding_grad)):
        if wanted and mask_of_grad is not None and not mask_of_grad.is_floating_point():
            raise RuntimeError(f"{name} must be floating for a gradient; got {mask_of_grad.dtype}")
    N, _, H, _ = query.shape
    dtype = arguments.accumulator_dtype
    sums_queries = padding_grad or (mask_grad and mask is not None and mask.shape[2] == 1)
    grad_columns = query.new_zeros((N, H, arguments.key.shape[1]), dtype=dtype) if sums_queries else None
    grad_mask = None
    if mask_grad and mask is not None and mask.shape[2] != 1:
        grad_mask = query.new_zeros(mask.shape, dtype=dtype)
    grads = [x.new_empty(x.shape) for x in (query, arguments.key, arguments.value)]
    biases = LIBRARY.backward(
        arguments,
        output,
        stats,
        torch.zeros_like(output) if grad_output is None else last_contiguous(grad_output),
        None if grad_weights is None else grad_weights.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        grad_mask,
        grad_columns,
        grads,
    )
    grad_attn_mask, grad_padding = query.new_empty((0,)), query.new_empty((0,))
    if mask_grad and mask is not None:
        if grad_mask is None:
            assert grad_columns is not None
            grad_mask = grad_columns.unsqueeze(2)  # [N, H, 1, S]
            for dim in (0, 1):
                grad_mask = _sum(grad_mask, dim) if mask.shape[dim] == 1 else grad_mask
        grad_attn_mask = grad_mask.to(mask.dtype)
    if padding_grad and padding is not None:
        assert grad_columns is not None
        grad_padding = _sum(grad_columns, 1).squeeze(1).to(padding.dtype)
    grad_biases = [query.new_empty((0,)) if grad is None else sum_over_batch(grad).to(query.dtype) for grad in biases]
    return *grads, grad_attn_mask, grad_padding, *grad_biases


class _Attention(torch.autograd.Function):
    """The operator `attention` and its gradient without the dispatcher, which costs as much as a small attention."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results = _forward(*inputs)
        autograd.setup(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel = _backward if is_eager() and not torch.is_grad_enabled() else schema.attention_backward
        return autograd.backward(ctx, *grads, attention_backward=kernel)


class _Product(torch.autograd.Function):
    """The operator `product` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        result = _product(*inputs)
        product_operator.setup(ctx, inputs, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        multiply = _product if is_eager() and not torch.is_grad_enabled() else product_operator.product
        return product_operator.backward(ctx, *grads, multiply=multiply)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def product(
    left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool
) -> Tensor:
    """The operator `product`, of plain tensors and parameters in eager mode without the dispatcher."""
    multiply: Any = product_operator.product
    if is_eager() and not left.is_neg() and not right.is_neg():
        multiply = _Product.apply if is_recorded(left, right, bias) else _product
    return multiply(left, right, bias, left_is_transposed, right_is_transposed)


def _product(
    left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool
) -> Tensor:
    assert LIBRARY is not None
    for name, x in (("left", left), ("right", right)):
        if x.dim() != 2:
            raise RuntimeError(f"{name} must be a matrix; got shape {tuple(x.shape)}")
    left, right = last_contiguous(left), last_contiguous(right)
    bias = None if bias is None else bias.contiguous()
    return LIBRARY.product(left, right, bias, left_is_transposed, right_is_transposed)


if LIBRARY is not None:
    schema.LIBRARY.impl("product", _product, "CPU")
    schema.LIBRARY.impl("attention", _forward, "CPU")
    schema.LIBRARY.impl("attention_backward", _backward, "CPU")
    schema.LIBRARY.impl("dropout_mask", LIBRARY.dropout_mask, "CPU")


def _notes(inputs: AttentionInputs) -> list[str]:
    assert LIBRARY is not None
    return [f"instruction set {LIBRARY.isa}"]


BACKEND = Backend(
    name="cpu",
    summary="the fused core in C++" + (f", instruction set {LIBRARY.isa}" if LIBRARY else ", not in this installation"),
    capability=Capability(
        devices=("cpu",),
        dtypes=DTYPES,
        transforms=False,
        onnx_export=False,
        reads_hidden_keys=False,
        is_installed=LIBRARY is not None,
    ),
    run=_run,
    notes=_notes,
)

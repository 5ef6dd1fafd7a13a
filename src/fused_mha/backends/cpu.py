"""The fused CPU core: loads the library, registers its kernels with the operators, and serves `dispatch`."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_mha.backends import native, sdpa
from fused_mha.backends.arguments import arguments_of
from fused_mha.backends.capability import Backend, Capability, not_supported_reasons
from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.memory import PLAIN_TYPES
from fused_mha.core.modes import is_eager, is_recorded, may_skip_dispatcher
from fused_mha.ops import autograd, gradients, module_autograd, schema
from fused_mha.ops import heads as heads_operator
from fused_mha.ops import module as module_operator
from fused_mha.ops import product as product_operator
from fused_mha.ops.schema import TENSORS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of inputs, and of masks that are not bool
LIBRARY = native.load(sys.modules[__name__.partition(".")[0]].__path__)

if LIBRARY is None:
    remedy = (
        "There is none for Windows yet."
        if sys.platform == "win32"
        else "To get the library, install GCC 11, Clang 14 or newer, and then fused_mha again by `pip install "
        "--force-reinstall --no-deps --no-cache-dir` (pip's cache may hold one without it)."
    )
    warnings.warn(
        f"fused_mha was installed without its C++ library: it works, on torch's own operators, and slower. {remedy}",
        stacklevel=2,
    )


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _kernel(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """The library's kernel of an operator, for eager calls: without autograd and what else the dispatcher would ask."""
    return functools.partial(operator.redispatch, _CPU)


_forward = _kernel(schema.attention)
_backward = functools.partial(gradients.attention_backward, _kernel(schema.attention_gradients))
_product = _kernel(product_operator.product)
_heads = _kernel(heads_operator.transform_heads)
_heads_backward = _kernel(heads_operator.transform_heads_backward)
_module = _kernel(module_operator.multi_head_attention)
_module_backward = _kernel(module_operator.multi_head_attention_backward)


def _run(inputs: AttentionInputs) -> AttentionResult:
    arguments = arguments_of(inputs)
    if not is_eager() or any(x is not None and (type(x) not in PLAIN_TYPES or x.is_neg()) for x in arguments[:TENSORS]):
        output, weights, lse, _ = schema.attention(*arguments)
    elif is_recorded(*arguments[:TENSORS]):
        output, weights, lse, _ = _Attention.apply(*arguments)
    else:
        output, weights, lse, _ = _forward(*arguments)
    return AttentionResult(output, weights if inputs.need_weights else None, lse if inputs.return_lse else None)


class _Attention(torch.autograd.Function):
    """The operator `attention` and its gradient without the dispatcher, which costs as much as a small attention."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results = _forward(*inputs)
        autograd.setup(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel = _backward if may_skip_dispatcher(grads) else schema.attention_backward
        return autograd.backward(ctx, *grads, attention_backward=kernel)


class _Product(torch.autograd.Function):
    """The operator `product` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        result = _product(*inputs)
        product_operator.setup(ctx, inputs, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        multiply = _product if may_skip_dispatcher(grads) else product_operator.product
        return product_operator.backward(ctx, *grads, multiply=multiply)


class _Heads(torch.autograd.Function):
    """The operator `transform_heads` without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        result = _heads(*inputs)
        heads_operator.setup(ctx, inputs, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernel = _heads_backward if may_skip_dispatcher(grads) else heads_operator.transform_heads_backward
        return heads_operator.backward(ctx, *grads, kernel=kernel)


class _Module(torch.autograd.Function):
    """The operator `multi_head_attention` and its gradient without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results = _module(*inputs)
        module_autograd.setup(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernel = _module_backward if may_skip_dispatcher(grads) else module_operator.multi_head_attention_backward
        return module_autograd.backward(ctx, *grads, kernel=kernel)


def product(
    left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool
) -> Tensor:
    """The operator `product`, of plain tensors and parameters in eager mode without the dispatcher."""
    multiply: Any = product_operator.product
    if is_eager() and not left.is_neg() and not right.is_neg():
        multiply = _Product.apply if is_recorded(left, right, bias) else _product
    return multiply(left, right, bias, left_is_transposed, right_is_transposed)


def transform_heads(x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Any) -> Tensor:
    """The operator of that name, of plain tensors and parameters in eager mode without the dispatcher."""
    call: Any = heads_operator.transform_heads
    if is_eager() and not x.is_neg():
        call = _Heads.apply if is_recorded(x, weight, bias) else _heads
    return call(x, weight, bias, *others)


def multi_head_attention(tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The operator of that name, of plain tensors and parameters in eager mode without the dispatcher."""
    keep = is_recorded(*tensors)
    call: Any = module_operator.multi_head_attention if not is_eager() else _Module.apply if keep else _module
    return call(*tensors, *numbers, keep)


if LIBRARY is not None:
    LIBRARY.register_operators()
    schema.LIBRARY.impl("attention_backward", _backward, "CPU")


_LEAST_LENGTH = 64  # from which on torch's tiles make up for what our kernels skip and fuse


def _leaves(inputs: AttentionInputs) -> str | None:
    """Why a call is left to torch's kernels, which use the processor's tiles (AMX) where ours do not."""
    if LIBRARY is None or inputs.query.dtype not in LIBRARY.tile_dtypes or inputs.key_padding_mask is not None:
        return None
    if min(inputs.query.shape[1], inputs.key.shape[1]) < _LEAST_LENGTH or not_supported_reasons(
        sdpa.BACKEND.capability, inputs
    ):
        return None
    return "torch's kernels multiply this dtype by the processor's tiles (AMX)"


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
    leaves=_leaves,
)

"""Modes of torch that change how a call has to be computed; the checks, the back ends and `reference` ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_mha.core.memory import has_plain_memory

Question = TypeVar("Question", bound=Callable[..., bool])

# torch has no public names for these. Where a future torch lacks one, the mode is taken to be active: the reference
# core serves then, which is slower and right.
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # without a check for torch.jit.script
_count_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)  # make_fx, FakeTensorMode, ...


def transform_is_active() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active."""
    return _functorch_is_active() or getattr(forward_ad, "_current_level", 0) >= 0


def autocast_is_on(device_type: str) -> bool:
    """Whether `torch.autocast` is on for a device."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def as_autocast_casts(x: Tensor) -> Tensor:
    """The tensor as autocast casts the inputs of an op in the lower precision: fp64 stays."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def constant_for_dynamo(function: Question) -> Question:
    """Let Dynamo, which cannot trace the function, ask it once for each graph and take the answer for a constant.

    `torch.compiler.assume_constant_result` sets the same mark, and imports Dynamo for it.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_for_dynamo  # of torch before 2.12
def _knows_autocast(device_type: str) -> bool:
    """Whether there is autocast for a device at all; for meta, there is none."""
    return torch.amp.is_autocast_available(device_type)


def onnx_export_is_active() -> bool:
    """Whether `torch.onnx.export` is tracing; its own check alone costs as much as three small ops."""
    return (torch.jit.is_tracing() or torch.compiler.is_compiling()) and _is_in_onnx_export()


@constant_for_dynamo  # which takes torch's question for False; where tracing without it fails, the exporter tries it
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


@constant_for_dynamo  # which takes torch's question for True, up to torch 2.10
def is_exported() -> bool:
    """Whether `torch.export` is tracing."""
    return torch.compiler.is_exporting()


def is_plain(x: Tensor) -> bool:
    """Whether nothing records or transforms ``x``, so that its values may be read and a result may take its place."""
    return type(x) is Tensor and not x.requires_grad and is_eager()


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def recordable(x: Tensor) -> Tensor:
    """A copy of ``x`` where autograd records and may not save it, since it is of `torch.inference_mode`; else ``x``."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.is_inference():
        return x.clone()
    return x


def is_eager() -> bool:
    """Whether no compiler, tracer, transform or mode sees the operators that are called."""
    if torch.compiler.is_compiling() or _is_tracing():
        return False
    return not _functorch_is_active() and getattr(forward_ad, "_current_level", 0) < 0 and not _count_dispatch_modes()


def is_traced_by_dynamo() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing Python, and no transform is active."""
    return torch.compiler.is_dynamo_compiling() and not transform_is_active() and not _is_in_onnx_export()


def may_skip_dispatcher(grads: Iterable[Tensor | None]) -> bool:
    """Whether a backward that is given these gradients may call kernels as they are."""
    return (
        is_eager()
        and not torch.is_grad_enabled()
        and all(grad is None or (type(grad) is Tensor and has_plain_memory(grad)) for grad in grads)
    )

"""Modes of torch that change how a call has to be computed; the checks, the back ends and `reference` ask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch has no public name for either. Where a future torch lacks one, a transform is taken to be active: the reference
# core serves then, which is slower and right.
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def transform_is_active() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active."""
    return _functorch_is_active() or getattr(forward_ad, "_current_level", 0) >= 0


def autocast_is_on(device_type: str) -> bool:
    """Whether `torch.autocast` is on for a device; there are devices, such as meta, that know no autocast."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def may_overwrite(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor that nothing records or transforms, so that a result may take its place."""
    is_plain = type(x) is Tensor and not x.requires_grad
    return is_plain and not (transform_is_active() or torch.compiler.is_compiling() or torch.jit.is_tracing())

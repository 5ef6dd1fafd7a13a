"""Modes of torch that change how a call has to be computed; the checks, the back ends and `reference` ask."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transform_is_active() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active; torch has no public name for either."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast_is_on(device_type: str) -> bool:
    """Whether `torch.autocast` is on for a device; there are devices, such as meta, that know no autocast."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

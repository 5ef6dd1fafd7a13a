"""Whether a transform of torch is under way that some cores can't serve; `reference` and the back ends ask."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transform_is_active() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active; torch has no public name for either."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0

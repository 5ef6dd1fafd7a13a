"""`transform_heads`: Q/K norm and rotation by one operator of the CPU library, or by torch's own in `core.heads`.

`steps` calls it, once for the queries and once for the keys, and `RotaryEmbedding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_mha.backends import cpu
from fused_mha.core import dispatch
from fused_mha.core import heads as by_torch
from fused_mha.core.heads import EPS, HeadNorm, Rotation
from fused_mha.core.memory import PLAIN_TYPES
from fused_mha.core.modes import is_eager, onnx_export_is_active, transform_is_active
from fused_mha.ops.heads import MOST_HEAD_SIZE, NORMS


def transform_heads(x: Tensor, norm: HeadNorm | None, rotation: Rotation | None) -> Tensor:
    """Normalise each head, then rotate it.

    Args:
        x: (N, L, H, D), any strides.
        norm: of each head, or None.
        rotation: of the first R <= D components, or None.

    Returns:
        (N, L, H, D), in the dtype of ``x``.
    """
    if (norm is None and rotation is None) or not _is_ours(x, norm, rotation):
        return by_torch.transform_heads(x, norm, rotation)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    cos, sin, layout = (None, None, "half") if rotation is None else rotation
    kind, eps = (0, 0.0) if norm is None else (NORMS[norm.kind], EPS[norm.kind])
    return cpu.transform_heads(x, weight, bias, cos, sin, kind, layout == "interleaved", eps)


def _is_ours(x: Tensor, norm: HeadNorm | None, rotation: Rotation | None) -> bool:
    if not x.is_cpu or x.dtype not in cpu.DTYPES or cpu.LIBRARY is None or not dispatch.allows(cpu.BACKEND):
        return False
    if transform_is_active() or torch.jit.is_tracing() or onnx_export_is_active():
        return False
    if x.shape[3] > MOST_HEAD_SIZE or (is_eager() and x.numel() == 0):
        return False
    learned = () if norm is None else norm[1:]
    angles: tuple[Tensor, ...] = () if rotation is None else rotation[:2]
    is_fp64 = x.dtype == torch.float64
    return not any(t.requires_grad for t in angles) and all(
        t is None or (type(t) in PLAIN_TYPES and t.is_cpu and (t.dtype == torch.float64) == is_fp64)
        for t in (x, *learned, *angles)
    )

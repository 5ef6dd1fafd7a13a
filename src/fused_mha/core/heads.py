"""What is done to each head between the in-projection and the attention: Q/K norm, then rotation.

All is differentiable PyTorch on (N, L, H, D); the half types are computed in fp32. `module.heads` calls
`transform_heads` where the operator of the CPU library cannot serve, `ops.heads` for second derivatives.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

QKNorm = Literal["rms", "layer", "l2"]
QK_NORMS: tuple[QKNorm, ...] = get_args(QKNorm)
RotaryLayout = Literal["half", "interleaved"]
# As in Llama and Qwen; in torch.nn.LayerNorm; of a square that is summed over D, not averaged.
EPS: dict[QKNorm, float] = {"rms": 1e-6, "layer": 1e-5, "l2": 1e-12}


class HeadNorm(NamedTuple):
    """The norm of each head of the queries or the keys."""

    kind: QKNorm
    weight: Tensor  # (D)
    bias: Tensor | None  # (D), of "layer" alone


class Rotation(NamedTuple):
    """By how much pairs of components are turned at each position, for the first R components of a head."""

    cos: Tensor  # (L, R / 2) or (N, L, R / 2), fp32, or fp64 for fp64
    sin: Tensor  # the same
    layout: RotaryLayout


def transform_heads(x: Tensor, norm: HeadNorm | None, rotation: Rotation | None) -> Tensor:
    """Normalise each head, then rotate it.

    Args:
        x: (N, L, H, D), any strides.
        norm: of each head, or None.
        rotation: of the first R <= D components, or None.

    Returns:
        (N, L, H, D), in the dtype of ``x``.
    """
    if norm is None and rotation is None:
        return x
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if norm is not None:
        x = normalized(x, norm)
    if rotation is not None:
        x = rotated(x, rotation)
    return x.to(dtype)


def normalized(x: Tensor, norm: HeadNorm) -> Tensor:
    """Normalise: x / sqrt(mean(x^2) + eps) * weight ("rms"), the same of x - mean(x), plus a bias ("layer"), or with
    the sum of the squares ("l2").
    """
    if norm.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    squares = x * x
    size = squares.sum(dim=-1, keepdim=True) if norm.kind == "l2" else squares.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(size + EPS[norm.kind]) * norm.weight.to(x.dtype)
    return x if norm.bias is None else x + norm.bias.to(x.dtype)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """(a, b) becomes (a cos - b sin, a sin + b cos) for each pair: components j and j + R / 2 in the layout "half", 2j
    and 2j + 1 in "interleaved".
    """
    cos, sin = rotation.cos.unsqueeze(-2), rotation.sin.unsqueeze(-2)  # for all heads
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if rotation.layout == "half":
        a, b = turned[..., :pairs], turned[..., pairs:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)
    a, b = turned[..., ::2], turned[..., 1::2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

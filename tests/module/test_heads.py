"""`transform_heads`: norms and rotation of single heads, by hand."""

import pytest
import torch

from fused_mha import RotaryEmbedding
from fused_mha.module.heads import HeadNorm, transform_heads

ROPE = RotaryEmbedding(4)


def norm(kind, dtype=torch.float64, scale=1.0):
    weight = torch.full((4,), scale, dtype=dtype)
    return HeadNorm(kind, weight, torch.full((4,), 0.5, dtype=dtype) if kind == "layer" else None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rms", [6 / 5, 8 / 5, 0.0, 0.0]),  # of mean square 25 / 4
        ("l2", [3 / 5, 4 / 5, 0.0, 0.0]),
        ("layer", [x / 3.1875**0.5 + 0.5 for x in (1.25, 2.25, -1.75, -1.75)]),  # of mean 7 / 4
    ],
)
def test_a_norm_by_hand(kind, expected):
    x = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    found = transform_heads(x, norm(kind), None).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
def test_zeros_have_finite_derivatives(kind):
    x = torch.zeros(1, 1, 1, 4, requires_grad=True)
    transform_heads(x, norm(kind, torch.float32), None).sum().backward()
    assert bool(x.grad.isfinite().all())


def test_the_norm_comes_before_the_rotation():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    of_heads, rotation = HeadNorm("rms", weight, None), ROPE.counted(0, x)
    by_steps = transform_heads(transform_heads(x, of_heads, None), None, rotation)
    assert torch.equal(transform_heads(x, of_heads, rotation), by_steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
def test_half_types_are_computed_in_fp32_and_rounded_once(kind, dtype):
    x = torch.randn(2, 5, 3, 4).to(dtype)
    exact = transform_heads(x.float(), norm(kind, torch.float32, 1.5), ROPE.counted(0, x))
    assert torch.equal(transform_heads(x, norm(kind, dtype, 1.5), ROPE.counted(0, x)), exact.to(dtype))


def test_without_norm_and_rotation_heads_are_what_they_were():
    x = torch.randn(2, 5, 3, 4)
    assert transform_heads(x, None, None) is x

"""`transform_heads`: norms and rotation of single heads, by hand."""

import pytest
import torch

from fused_mha import RotaryEmbedding
from fused_mha.core import heads as by_torch
from fused_mha.core.heads import HeadNorm
from fused_mha.module import heads as by_operator

ROPE = RotaryEmbedding(4)


each_way = pytest.mark.parametrize("transform", [by_torch.transform_heads, by_operator.transform_heads])


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
@each_way
def test_a_norm_by_hand(kind, expected, transform):
    x = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4)
    found = transform(x, norm(kind), None).flatten()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@each_way
def test_zeros_have_finite_derivatives(kind, transform):
    x = torch.zeros(1, 1, 1, 4, requires_grad=True)
    transform(x, norm(kind, torch.float32), None).sum().backward()
    assert bool(x.grad.isfinite().all())


@each_way
def test_the_norm_comes_before_the_rotation(transform):
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    of_heads, rotation = HeadNorm("rms", weight, None), ROPE.counted(0, x)
    by_steps = transform(transform(x, of_heads, None), None, rotation)
    torch.testing.assert_close(transform(x, of_heads, rotation), by_steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@each_way
def test_half_types_are_computed_in_fp32_and_rounded_once(kind, dtype, transform):
    x = torch.randn(2, 5, 3, 4).to(dtype)
    exact = transform(x.float(), norm(kind, torch.float32, 1.5), ROPE.counted(0, x))
    assert torch.equal(transform(x, norm(kind, dtype, 1.5), ROPE.counted(0, x)), exact.to(dtype))


@each_way
def test_without_norm_and_rotation_heads_are_what_they_were(transform):
    x = torch.randn(2, 5, 3, 4)
    assert transform(x, None, None) is x

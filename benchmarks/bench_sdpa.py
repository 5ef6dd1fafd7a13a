"""`fused_mha.scaled_dot_product_attention`, which `serve_sdpa` calls, against torch's: `python benchmarks/run.py sdpa`.

The sizes are those of models that call torch's function, and so is the layout: (N, H, L, D) is a view of projections
(N, L, H, D). The small sizes show what leaving a call to torch costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_mha
from fused_mha.benchmark.attention_cells import forward, forward_backward
from fused_mha.benchmark.harness import BAR, BenchCase, Contender, GroupBar
from fused_mha.testing import assert_parity

Function = Callable[..., Tensor]
Size = tuple[int, int, int, int, int, int]  # N, H, H_kv, L, S, D


class Kind(NamedTuple):
    """A group of calls."""

    bar: GroupBar
    sizes: tuple[Size, ...]
    dtype: torch.dtype = torch.float32
    training: bool = False
    mask: str | None = None  # bool: causal and padded at the left, as generating models make it


MODELS: tuple[Size, ...] = (
    (8, 12, 12, 128, 128, 64),
    (8, 12, 12, 512, 512, 64),
    (1, 16, 16, 1024, 1024, 64),
    (16, 6, 6, 197, 197, 64),
    (1, 32, 32, 512, 512, 128),
)
GROUPED: tuple[Size, ...] = ((1, 32, 8, 2048, 2048, 128), (4, 16, 2, 256, 256, 64))
SMALL: tuple[Size, ...] = ((1, 4, 4, 16, 16, 64), (1, 8, 8, 64, 64, 64))
QUEUED: tuple[Size, ...] = ((1, 32, 8, 1, 2048, 128), (8, 16, 16, 1, 1024, 64))
QUICK: tuple[Size, ...] = ((1, 4, 2, 200, 200, 64),)
KINDS = {
    "fp32 forward": Kind(GroupBar(1.0, 2.0), MODELS),
    "fp32 forward, mask": Kind(GroupBar(1.0, 3.0), MODELS, mask="bool"),
    "fp32 forward and backward": Kind(GroupBar(1.0, 2.0), MODELS, training=True),
    "bf16 forward": Kind(GroupBar(1.0, 1.2), MODELS, torch.bfloat16),
    "bf16 forward and backward": Kind(GroupBar(1.0, 3.0), MODELS, torch.bfloat16, training=True),
    "grouped heads, fp32 forward": Kind(GroupBar(2.0, 3.0), GROUPED),
    "grouped heads, fp32 forward and backward": Kind(GroupBar(2.0, 3.0), GROUPED, training=True),
    "one query, fp32 forward": Kind(GroupBar(1.0, 1.5), QUEUED),
    "small, fp32 forward, left to torch": Kind(GroupBar(0.8, 1.0), SMALL),
}
GROUPS = {group: kind.bar for group, kind in KINDS.items()}


class Call(nn.Module):
    """A function as a module, for the parity kit."""

    def __init__(self, function: Function, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.function(query, key, value, **self.arguments)


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every kind at every size."""
    for group, kind in KINDS.items():
        for size in QUICK if options.quick else kind.sizes:
            yield _case(group, kind, size)


def _case(group: str, kind: Kind, size: Size) -> BenchCase:
    N, H, H_kv, L, S, D = size
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, L, H, D), (N, S, H_kv, D), (N, S, H_kv, D), (N, L, H, D))
    query, key, value, grad = (
        torch.randn(shape, generator=generator).to(kind.dtype).transpose(1, 2) for shape in shapes
    )
    arguments: dict[str, Any] = {"enable_gqa": True} if H_kv != H else {}
    if kind.mask is not None:
        visible = torch.ones(L, S, dtype=torch.bool).tril()
        padding = torch.arange(S) >= torch.arange(N)[:, None] * S // (2 * N)
        arguments["attn_mask"] = visible & padding[:, None, None] | torch.eye(L, S, dtype=torch.bool)

    def contender(function: Function) -> Contender:
        def attention(*inputs: Tensor) -> tuple[Tensor, ...]:
            return (function(*inputs, **arguments),)

        if kind.training:
            return forward_backward(attention, (query, key, value), (grad,))
        return forward(attention, (query, key, value))

    def verify() -> None:
        ours = Call(fused_mha.scaled_dot_product_attention, arguments)
        with torch.set_grad_enabled(kind.training):
            assert_parity(ours, Call(F.scaled_dot_product_attention, arguments), query, key, value)

    heads = str(H) if H_kv == H else f"{H}:{H_kv}"
    name = f"{N}x{heads}x{L if L == S else f'{L}->{S}'}x{D}"
    baselines = {"torch": contender(F.scaled_dot_product_attention)}
    return BenchCase(group, name, contender(fused_mha.scaled_dot_product_attention), baselines, BAR, verify)

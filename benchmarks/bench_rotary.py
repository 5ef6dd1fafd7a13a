"""The module with RoPE and Q/K norm, against the same of torch's operators: `python benchmarks/run.py rotary`.

The baseline is what models write by hand: one product for query, key and value, `F.rms_norm` of each head, a rotation
by the table of cos and sin, `F.scaled_dot_product_attention` and the last product.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_mha
from fused_mha.benchmark.attention_cases import check_errors
from fused_mha.benchmark.harness import BAR, BenchCase, Contender, GroupBar
from fused_mha.benchmark.module_cells import Cell

CELLS = (Cell(8, 512, 512, 768, 12), Cell(1, 1024, 1024, 512, 8))
QUICK = (Cell(1, 64, 64, 128, 2),)
GROUPS = {"RoPE and Q/K norm, inference": GroupBar(1.5, 2.0), "RoPE and Q/K norm, training step": GroupBar(1.5, 2.0)}
EPS = 1e-6


class ByHand(nn.Module):
    """The same module by torch's operators, on the parameters of ours."""

    def __init__(self, ours: fused_mha.MultiHeadAttention, length: int) -> None:
        super().__init__()
        self.of = ours
        D = ours.head_dim
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = (x.to(ours.out_proj.weight.dtype) for x in (angles.cos(), angles.sin()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) to (N, L, E), causal."""
        (N, L, E), of = x.shape, self.of
        heads = F.linear(x, of.in_proj_weight, of.in_proj_bias).view(N, L, 3, of.num_heads, of.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        q = self._rotated(F.rms_norm(q, (of.head_dim,), of.q_norm_weight, EPS))
        k = self._rotated(F.rms_norm(k, (of.head_dim,), of.k_norm_weight, EPS))
        merged = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(N, L, E)
        return of.out_proj(merged)

    def _rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-b, a), dim=-1) * self.sin


class Ours(nn.Module):
    """A module of ours in self-attention."""

    def __init__(self, of: fused_mha.MultiHeadAttention) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, E) to (N, L, E), causal."""
        return self.of(x, x, x, need_weights=False, is_causal=True)[0]


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Both modes at every size."""
    for group in GROUPS:
        for cell in QUICK if options.quick else CELLS:
            yield _case(group, cell, training="training" in group)


def _case(group: str, cell: Cell, training: bool) -> BenchCase:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn((cell.N, cell.L, cell.E), generator=generator) for _ in range(2))

    def modules(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        rope = fused_mha.RotaryEmbedding(cell.E // cell.H)
        of = fused_mha.MultiHeadAttention(cell.E, cell.H, batch_first=True, rope=rope, qk_norm="rms").to(dtype)
        return Ours(of), ByHand(of, cell.L)

    def contender(module: nn.Module, dtype: torch.dtype = torch.float32) -> Contender:
        if not training:
            return lambda: _inference(module, x.to(dtype))
        given, cotangent = x.to(dtype).requires_grad_(), grad.to(dtype)
        learned = [given, *module.parameters()]

        def step() -> tuple[Tensor, ...]:
            output = module(given)
            return output, *torch.autograd.grad(output, learned, cotangent)

        return step

    ours, by_hand = modules(torch.float32)

    def verify() -> None:
        _, exact = modules(torch.float64)
        names = ["output", *(["grad", *(name for name, _ in ours.named_parameters())] if training else [])]
        contenders = (contender(ours), contender(by_hand), contender(exact, torch.float64))
        check_errors(f"{group}, {cell}", torch.float32, names, *contenders)

    return BenchCase(group, str(cell), contender(ours), {"torch": contender(by_hand)}, BAR, verify)


def _inference(module: nn.Module, x: Tensor) -> tuple[Tensor]:
    with torch.no_grad():
        return (module(x),)

"""softcap, sinks and ALiBi of `fused_mha.attention`, and the weights of some heads: `python benchmarks/run.py options`.

Against the same call without the option, which says what the option costs, and the first three against torch's
operators, which is what a model does without us: torch's fused function knows none of them but ALiBi, as a mask tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_mha
from fused_mha.benchmark.attention_cases import check_errors
from fused_mha.benchmark.attention_cells import Cell, forward, forward_backward, tensors
from fused_mha.benchmark.harness import BAR, BenchCase, Contender, GroupBar

CELLS = (Cell(8, 12, 512, 512, 64), Cell(1, 8, 2048, 2048, 64), Cell(1, 8, 2048, 2048, 128))
QUICK = (Cell(1, 2, 200, 200, 64),)
OFF, TORCH = GroupBar(0.85, 0.95), GroupBar(1.0, 3.0)


class Option(NamedTuple):
    """One option of a causal call, and the same by torch."""

    arguments: Callable[[Cell], dict[str, Any]]
    theirs: Callable[[Tensor, Tensor, Tensor, Cell, dict[str, Any]], Tensor]  # of (N, H, L, D)


def _slopes(cell: Cell) -> Tensor:
    """Those of Press et al. for a power of two, with which a half of the heads see far."""
    return 2.0 ** -(8.0 / cell.H * torch.arange(1, cell.H + 1))


def _hidden(cell: Cell) -> Tensor:
    return torch.ones(cell.L, cell.S, dtype=torch.bool).triu(1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(2, 3) * q.shape[3] ** -0.5


def _capped(q: Tensor, k: Tensor, v: Tensor, cell: Cell, given: dict[str, Any]) -> Tensor:
    scores = torch.tanh(_scores(q, k) / given["softcap"]) * given["softcap"]
    return scores.masked_fill(_hidden(cell), -torch.inf).softmax(-1) @ v


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, cell: Cell, given: dict[str, Any]) -> Tensor:
    scores = _scores(q, k).masked_fill(_hidden(cell), -torch.inf)
    sinks = given["sinks"].to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1] @ v


def _with_alibi(q: Tensor, k: Tensor, v: Tensor, cell: Cell, given: dict[str, Any]) -> Tensor:
    distances = (torch.arange(cell.L)[:, None] - torch.arange(cell.S)).abs()
    mask = (-given["alibi_slopes"][:, None, None] * distances).masked_fill(_hidden(cell), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


OPTIONS = {
    "softcap": Option(lambda _: {"softcap": 30.0}, _capped),
    "sinks": Option(lambda cell: {"sinks": torch.linspace(-2.0, 2.0, cell.H)}, _with_sinks),
    "ALiBi": Option(lambda cell: {"alibi_slopes": _slopes(cell)}, _with_alibi),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def groups() -> Iterator[tuple[str, str, torch.dtype, bool, str, GroupBar]]:
    """Their names, and of what each is."""
    for option in OPTIONS:
        for named, dtype in DTYPES.items():
            for training in (False, True):
                for against, bar in (("off", OFF), ("torch", TORCH)):
                    what = "forward and backward" if training else "forward"
                    yield f"{option}, {named} {what}, against {against}", option, dtype, training, against, bar


HEADS = (0, 3)
CELL_OF_WEIGHTS, QUICK_CELL_OF_WEIGHTS = Cell(1, 16, 2048, 2048, 64), Cell(1, 4, 200, 200, 64)
OF_WEIGHTS = {f"weights of 2 of 16 heads, {named} forward, against none": dtype for named, dtype in DTYPES.items()}
GROUPS = {group: bar for group, *_, bar in groups()} | dict.fromkeys(OF_WEIGHTS, GroupBar(0.9, 0.95))


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every option at every size."""
    for group, option, dtype, training, against, _ in groups():
        for cell in QUICK if options.quick else CELLS:
            yield _case(group, OPTIONS[option], cell, dtype, training, against)
    for group, dtype in OF_WEIGHTS.items():
        yield _case_of_weights(group, QUICK_CELL_OF_WEIGHTS if options.quick else CELL_OF_WEIGHTS, dtype)


def _case(group: str, option: Option, cell: Cell, dtype: torch.dtype, training: bool, against: str) -> BenchCase:
    N, H, L, S, D = cell
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, L, H, D), (N, S, H, D), (N, S, H, D), (N, L, H, D))
    query, key, value, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    given = option.arguments(cell)

    def ours(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        return fused_mha.attention(query, key, value, is_causal=True, **arguments).output

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return option.theirs(q, k, v, cell, given).transpose(1, 2)

    def contender(function: Callable[..., Tensor], dtype: torch.dtype = dtype, **arguments: Any) -> Contender:
        def attention(*inputs: Tensor) -> tuple[Tensor, ...]:
            return (function(*inputs, **arguments),)

        inputs = [x.to(dtype) for x in (query, key, value)]
        return forward_backward(attention, inputs, (grad.to(dtype),)) if training else forward(attention, inputs)

    def verify() -> None:
        names = ["output", *(["grad_query", "grad_key", "grad_value"] if training else [])]
        exact = contender(theirs, torch.float64 if dtype == torch.float32 else torch.float32)
        check_errors(f"{group}, {cell}", dtype, names, contender(ours, **given), contender(theirs), exact)

    baseline, bar = (contender(ours), OFF.at_least) if against == "off" else (contender(theirs), BAR)
    return BenchCase(group, str(cell), contender(ours, **given), {against: baseline}, bar, verify)


def _case_of_weights(group: str, cell: Cell, dtype: torch.dtype) -> BenchCase:
    inputs = tensors(cell, dtype).inputs

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output, weights, _ = fused_mha.attention(query, key, value, weights_of_heads=HEADS)
        assert weights is not None
        return output, weights

    def without(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (fused_mha.attention(query, key, value).output,)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        weights = _scores(q, k).softmax(-1)
        return (weights @ v).transpose(1, 2), weights[:, list(HEADS)]

    def verify() -> None:
        wider = [x.to(torch.float64 if dtype == torch.float32 else torch.float32) for x in inputs]
        both = forward(ours, inputs), forward(theirs, inputs), forward(theirs, wider)
        check_errors(f"{group}, {cell}", dtype, ["output", "weights"], *both)

    bar = GROUPS[group].at_least
    return BenchCase(group, str(cell), forward(ours, inputs), {"none": forward(without, inputs)}, bar, verify)

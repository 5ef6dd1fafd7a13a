"""Packed sequences on a GPU, against the padded batch by our kernels and against torch's `varlen_attn`: a part of
`bench_cuda`.

Lengths are uniform in [L / 8, L].
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fused_mha
from fused_mha.benchmark.attention_cases import check_errors
from fused_mha.benchmark.attention_cells import Cell
from fused_mha.benchmark.harness import BenchCase, Contender, GroupBar

GROUPS = {"packed, forward": GroupBar(1.0, 1.5), "packed, forward and backward": GroupBar(1.0, 1.5)}
CELLS = tuple(Cell(N, H, L, L, D) for N, H, L, D in ((8, 16, 2048, 64), (64, 12, 256, 64), (8, 16, 2048, 128)))
QUICK = (Cell(3, 2, 40, 40, 64),)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str, dtype: torch.dtype, *, quick: bool = False) -> Iterator[BenchCase]:
    """Plain and causal, at every size."""
    for group in GROUPS:
        for cell in QUICK if quick else CELLS:
            for is_causal in (False, True):
                yield _case(group, cell, is_causal, device, dtype)


def _case(group: str, cell: Cell, is_causal: bool, device: str, dtype: torch.dtype) -> BenchCase:
    N, H, L, _, D = cell
    learns = "backward" in group
    name = f"{cell}, {'causal' if is_causal else 'plain'}"
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(L // 8, L + 1, (N,), generator=generator)
    padding = (torch.arange(L) >= lengths[:, None]).to(device)
    padded = [torch.randn((N, L, H, D), generator=generator).to(device, dtype) for _ in range(4)]
    rows = [fused_mha.pack(x, padding)[0] for x in padded]
    offsets = fused_mha.pack(padded[0], padding)[1]
    bounds = offsets.tolist()

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused_mha.varlen_attention(query, key, value, offsets, offsets, is_causal=is_causal).output

    def of_padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused_mha.attention(query, key, value, key_padding_mask=padding, is_causal=is_causal).output

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = ([x[None, begin:end] for x in (query, key, value)] for begin, end in itertools.pairwise(bounds))
        with fused_mha.backend("reference"):
            return torch.cat([fused_mha.attention(*part, is_causal=is_causal).output[0] for part in parts])

    def contender(attention: Attention, given: Sequence[Tensor], dtype: torch.dtype = dtype) -> Contender:
        *inputs, cotangent = (x.to(dtype) for x in given)
        inputs = [x.requires_grad_(learns) for x in inputs]

        def call() -> tuple[Tensor, ...]:
            output = attention(*inputs)
            return output, *(torch.autograd.grad(output, inputs, cotangent) if learns else ())

        return call

    cotangent = padded[3].masked_fill(padding[:, :, None, None], 0.0)  # what padding gives is of no interest
    baselines = {"padded": contender(of_padded, (*padded[:3], cotangent))}
    torchs = contender(_varlen_attn(offsets, int(lengths.max()), is_causal), rows)
    try:
        torchs()
        baselines["varlen_attn"] = torchs
    except (ImportError, NotImplementedError, RuntimeError) as error:
        print(f"not timed: varlen_attn beside {group}, {name}: {str(error).partition('. ')[0]}")
    timed = contender(ours, rows)

    def verify() -> None:
        names = ["output", *(("grad_query", "grad_key", "grad_value") if learns else ())]
        theirs, exact = contender(one_by_one, rows), contender(one_by_one, rows, torch.float64)
        check_errors(f"{group}, {name}", dtype, names, timed, theirs, exact)

    return BenchCase(group, name, timed, {**baselines}, 0.0, verify)


def _varlen_attn(offsets: Tensor, longest: int, is_causal: bool) -> Attention:
    """Torch's, which is told on the host how long the longest sequence is."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - an older torch has none

        has_windows = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.10 has is_causal
        window = (-1, 0 if is_causal else -1)
        flags: dict[str, Any] = {"window_size": window} if has_windows else {"is_causal": is_causal}
        ends = offsets.to(torch.int32)
        output: Any = varlen_attn(query, key, value, ends, ends, longest, longest, **flags)
        return output

    return attention

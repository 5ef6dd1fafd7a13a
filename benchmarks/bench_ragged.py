"""Ragged batches without padding, against torch's padded and nested runs: `python benchmarks/run.py ragged`.

Lengths are uniform in [L / 8, L]. Our module takes a jagged nested tensor, one that is packed from a padded batch and
unpacked behind, or the padded batch itself. Torch's takes the padded batch with a key_padding_mask, or a strided nested
tensor in its fast path. The core alone is timed against `fused_mha.attention` on one sequence after the other.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fused_mha
from fused_mha.benchmark.attention_cases import check_errors
from fused_mha.benchmark.harness import BAR, BenchCase, Contender, GroupBar
from fused_mha.benchmark.module_cells import Cell

CELLS = (Cell(8, 1024, 1024, 768, 12), Cell(64, 128, 128, 256, 4))
QUICK = (Cell(3, 32, 32, 64, 2),)
NESTED, PADDED, PACKING = "nested", "padded", "packed and unpacked"
FAST_PATH, CORE = "nested against torch's nested", "core"
GROUPS = {
    f"{PADDED}, inference": GroupBar(1.0, 2.0),
    f"{PADDED}, training step": GroupBar(1.0, 2.0),
    f"{NESTED}, inference": GroupBar(2.0, 3.0),
    f"{NESTED}, training step": GroupBar(2.0, 3.0),
    f"{PACKING}, inference": GroupBar(1.5, 3.0),
    f"{PACKING}, training step": GroupBar(1.5, 3.0),
    f"{FAST_PATH}, inference": GroupBar(1.5, 2.0),
    f"{CORE}, forward": GroupBar(1.2, 1.2),
    f"{CORE}, forward and backward": GroupBar(1.2, 1.2),
}
Run = Callable[[nn.Module, Tensor], Tensor]  # the module on rows or a padded batch, as the caller has it


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every group at every size."""
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
    for group in GROUPS:
        for cell in QUICK if options.quick else CELLS:
            yield _core_case(group, cell) if group.startswith(CORE) else _module_case(group, cell)


def _lengths(cell: Cell) -> Tensor:
    return torch.randint(cell.L // 8, cell.L + 1, (cell.N,), generator=torch.Generator().manual_seed(0))


def _module_case(group: str, cell: Cell) -> BenchCase:
    what, mode = group.rsplit(", ", 1)
    lengths = _lengths(cell)
    padding = torch.arange(cell.L) >= lengths[:, None]
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn((cell.N, cell.L, cell.E), generator=generator) for _ in range(2))
    offsets = fused_mha.pack(x, padding)[1]

    def padded(module: nn.Module, given: Tensor) -> Tensor:
        return module(given, given, given, key_padding_mask=padding, need_weights=False)[0]

    def nested(module: nn.Module, rows: Tensor) -> Tensor:
        sequences = torch.nested.nested_tensor_from_jagged(rows, offsets)
        return module(sequences, sequences, sequences, need_weights=False)[0].values()

    def packing(module: nn.Module, given: Tensor) -> Tensor:
        return fused_mha.unpack(nested(module, fused_mha.pack(given, padding)[0]), padding)

    def strided(module: nn.Module, rows: Tensor) -> Tensor:
        sequences = torch.nested.as_nested_tensor([*rows.split(lengths.tolist())])
        return module(sequences, sequences, sequences, need_weights=False)[0]

    def contender(run: Run, is_packed: bool, dtype: torch.dtype, of_torch: bool, compares: bool = False) -> Contender:
        torch.manual_seed(0)
        kind = nn.MultiheadAttention if of_torch else fused_mha.MultiHeadAttention
        module = kind(cell.E, cell.H, batch_first=True, dtype=dtype).train(mode != "inference")
        given, cotangent = (fused_mha.pack(y, padding)[0] if is_packed else y for y in (x.to(dtype), grad.to(dtype)))
        if not is_packed:  # what padding gives is of no interest
            cotangent = cotangent.masked_fill(padding.unsqueeze(-1), 0.0)

        def rows_of(y: Tensor) -> Tensor:
            if not compares:
                return y
            return torch.cat(y.unbind()) if y.is_nested else y if is_packed else fused_mha.pack(y, padding)[0]

        def inference() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (rows_of(run(module, given)),)

        learned = [given.requires_grad_(mode != "inference"), *module.parameters()]

        def step() -> tuple[Tensor, ...]:
            output = run(module, given)
            of_input, *others = torch.autograd.grad(output, learned, cotangent)
            return rows_of(output), rows_of(of_input), *others

        return inference if mode == "inference" else step

    runs = {PADDED: (padded, False), PACKING: (packing, False), NESTED: (nested, True), FAST_PATH: (strided, True)}
    ours, is_packed = runs[what]
    theirs, their_is_packed = runs[FAST_PATH if what == FAST_PATH else PADDED]

    def verify() -> None:
        names = ["output"]
        if mode != "inference":
            names += ["grad", *dict(nn.MultiheadAttention(cell.E, cell.H).named_parameters())]
        single, double = torch.float32, torch.float64
        contenders = (
            contender(ours, is_packed, single, of_torch=False, compares=True),
            contender(theirs, their_is_packed, single, of_torch=True, compares=True),
            contender(padded, False, double, of_torch=True, compares=True),
        )
        check_errors(f"{group}, {cell}", single, names, *contenders)

    single = torch.float32
    torchs = {"torch": contender(theirs, their_is_packed, single, of_torch=True)}
    return BenchCase(group, str(cell), contender(ours, is_packed, single, of_torch=False), torchs, BAR, verify)


def _core_case(group: str, cell: Cell) -> BenchCase:
    lengths = _lengths(cell)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(1)
    size = (int(lengths.sum()), cell.H, cell.E // cell.H)
    rows = [torch.randn(size, generator=generator) for _ in range(4)]
    learns = "backward" in group

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused_mha.varlen_attention(query, key, value, offsets, offsets).output

    def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bounds = itertools.pairwise(offsets.tolist())
        parts = ([x[None, begin:end] for x in (query, key, value)] for begin, end in bounds)
        return torch.cat([fused_mha.attention(*part).output.squeeze(0) for part in parts])

    def contender(run: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Contender:
        *inputs, cotangent = (x.to(dtype) for x in rows)
        inputs = [x.requires_grad_(learns) for x in inputs]

        def call() -> tuple[Tensor, ...]:
            output = run(*inputs)
            return output, *(torch.autograd.grad(output, inputs, cotangent) if learns else ())

        return call

    def verify() -> None:
        names = ["output", *(("grad_query", "grad_key", "grad_value") if learns else ())]
        exact = contender(one_by_one, torch.float64)
        check_errors(f"{group}, {cell}", torch.float32, names, contender(packed), contender(one_by_one), exact)

    return BenchCase(group, str(cell), contender(packed), {"one by one": contender(one_by_one)}, BAR, verify)

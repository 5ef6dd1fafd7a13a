"""The CUDA core and the module on it against torch's, in bf16.

Run it by `python benchmarks/run.py cuda`, or with the tests by `python benchmarks/run_cuda.py`. Without a GPU,
`--quick` runs the same cases in small sizes on the CPU, to see that the script is whole; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cuda_beside
import cuda_packed
import fused_mha
from fused_mha.benchmark.attention_cells import Cell
from fused_mha.benchmark.cuda_cases import MODULES, module_cases_on
from fused_mha.benchmark.harness import DROPOUT, BenchCase, GroupBar, Report, skipped
from fused_mha.benchmark.memory import allocated_on_gpu
from fused_mha.benchmark.module_cells import Mode, inference, modules
from fused_mha.testing import tolerance

HAS_GPU = torch.cuda.is_available()
WORKERS = min(os.cpu_count() or 1, 16)  # processes that share the GPU: each holds half a gigabyte of it
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16  # which the interpreter computes right
GROUPS = {
    "plain and causal, forward": GroupBar(0.97, 1.0),
    "plain and causal, forward and backward": GroupBar(0.97, 1.0),
    "padding, forward and backward": GroupBar(1.5, 2.5),
    "causal and padding, forward and backward": GroupBar(1.5, 2.5),
    "causal mask as a tensor, forward and backward": GroupBar(1.5, 2.5),
    "float mask, forward and backward": GroupBar(1.5, 2.5),
    "dropout, forward and backward": GroupBar(1.0, 1.2),
    "own kernels, forward": GroupBar(0.7, 0.9),
    "own kernels, forward and backward": GroupBar(0.5, 0.65),
    **cuda_packed.GROUPS,
    "module, inference": GroupBar(1.0, 1.2),
    "module, training step": GroupBar(1.0, 1.2),
    "small module, inference": GroupBar(1.0, 1.5),
    "small module, training step": GroupBar(1.0, 1.5),
}
CELLS = tuple(Cell(N, H, L, L, D) for D in (64, 128) for N, H, L in ((8, 12, 512), (4, 16, 2048), (1, 16, 4096)))
LONG = tuple(Cell(4, 16, 4096, 4096, D) for D in (64, 128))
QUICK = (Cell(2, 2, 40, 40, 64),)
COMPILED = tuple(Cell(1, 16, 1024, 1024, D) for D in (64, 128))  # of every length the kernels are the same


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """All of them; on the CPU with --quick alone."""
    if not (HAS_GPU or options.quick):
        raise SystemExit("there is no CUDA device; --quick runs small cases on the CPU")
    cells, long = (QUICK, QUICK) if options.quick else (CELLS, LONG)
    for training in (False, True):
        steps = "forward and backward" if training else "forward"
        for cell in cells:
            for causal in (False, True):
                name = f"{cell}, {'causal' if causal else 'plain'}"
                yield _case(f"plain and causal, {steps}", name, cell, training, is_causal=causal)
        for cell in long:
            yield _case(f"own kernels, {steps}", str(cell), cell, training, own=HAS_GPU)
    for cell in cells:
        for name, arguments in _masked(cell).items():
            yield _case(f"{name}, forward and backward", str(cell), cell, True, **arguments)
    yield from cuda_packed.cases(DEVICE, DTYPE, quick=options.quick)
    yield from module_cases_on(DEVICE, DTYPE, quick=options.quick)


def _masked(cell: Cell) -> dict[str, dict[str, Any]]:
    N, L = cell.N, cell.L
    padding = torch.arange(L, device=DEVICE).expand(N, L) >= L // 2
    return {
        "padding": {"key_padding_mask": padding},
        "causal and padding": {"key_padding_mask": padding, "is_causal": True},
        "causal mask as a tensor": {"attn_mask": torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1)},
        "float mask": {"attn_mask": torch.randn(1, cell.H, L, L, device=DEVICE, dtype=DTYPE)},
        "dropout": {"dropout_p": DROPOUT},
    }


def _kinds() -> list[tuple[Cell, torch.dtype, dict[str, Any]]]:
    """Of calls whose kernels differ: head size, dtype and arguments, those that need no gradient among them."""
    weights = {"need_weights": True}
    kinds = [(cell, DTYPE, arguments) for cell in COMPILED for arguments in (*_masked(cell).values(), {}, weights)]
    (cell, *_), small = COMPILED, Cell(1, 8, 64, 64, 32)
    masked = _masked(cell)
    kinds += [(cell, DTYPE, masked[name] | weights) for name in ("padding", "dropout")]
    kinds += [(cell, torch.float32, arguments) for arguments in (masked["padding"], weights)]
    return kinds + [(small, DTYPE, arguments) for arguments in (_masked(small)["padding"], weights)]


PARTS = 2 * 7 + 6 + len(COMPILED)  # which `warm` divides the kernels into


def warm(part: int) -> None:
    """Compile the kernels of a part of the cases into Triton's cache of files, for the processes that come."""
    kinds = _kinds()
    if part >= len(kinds):
        size = COMPILED[part - len(kinds)].D
        fused_mha.warm_up([size], calls=[{"packed": True}], dtype=DTYPE, device=DEVICE, backward=True)
        return
    cell, dtype, arguments = kinds[part]
    shape = (cell.N, cell.L, cell.H, cell.D)
    inputs = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
    with fused_mha.backend("triton"):
        results = fused_mha.attention(*inputs, **arguments)
    loss = results.output.sum() if results.weights is None else results.output.sum() + results.weights.sum()
    loss.backward()


def _merged(cell: Cell, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """The masks as SDPA takes them: True = attend, or added."""
    if attn_mask is not None:
        return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
    if key_padding_mask is None:
        return None
    visible = ~key_padding_mask[:, None, None]
    if is_causal:
        visible = visible & torch.ones(cell.L, cell.S, dtype=torch.bool, device=DEVICE).tril()
    return visible.expand(-1, -1, cell.L, -1).contiguous()


def _case(
    group: str,
    name: str,
    cell: Cell,
    training: bool,
    *,
    own: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> BenchCase:
    N, H, L, S, D = cell
    shapes = ((N, L, H, D), (N, S, H, D), (N, S, H, D))
    inputs = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=training) for shape in shapes]
    grad = torch.randn(N, L, H, D, device=DEVICE, dtype=DTYPE)
    merged = _merged(cell, attn_mask, key_padding_mask, is_causal)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with fused_mha.backend("triton") if own else contextlib.nullcontext():
            return fused_mha.attention(
                q,
                k,
                v,
                attn_mask=attn_mask,
                key_padding_mask=key_padding_mask,
                is_causal=is_causal,
                dropout_p=dropout_p,
            ).output

    def sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            causal = is_causal and merged is None
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            output = F.scaled_dot_product_attention(q, k, v, merged, dropout_p, causal)
            return output.transpose(1, 2)

    def contender(attention: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            output = attention(*inputs)
            return [output, *torch.autograd.grad(output, inputs, grad)] if training else [output]

        return call

    baselines: dict[str, Callable[[], list[Tensor]]] = {}
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for kernel in (*kernels, SDPBackend.MATH):
        call = contender(functools.partial(sdpa, kernel))
        with contextlib.suppress(RuntimeError):  # that kernel cannot serve
            if kernel == SDPBackend.MATH and baselines:
                continue
            call()
            baselines[kernel.name.lower()] = call
    timed = contender(ours)
    beside: dict[str, Callable[[], list[Tensor]]] = {}
    if key_padding_mask is not None:
        made = cuda_beside.flex_attention(f"{group}, {name}", key_padding_mask, is_causal, cell.L, inputs)
        beside |= {} if made is None else {"flex_attention": contender(made)}
    if attn_mask is not None and attn_mask.is_floating_point():
        beside["sdpa_cleaned"] = contender(functools.partial(cuda_beside.cleaned, attn_mask))

    def verify() -> None:
        if dropout_p:  # theirs draws otherwise
            return
        exact = contender(functools.partial(_exact, merged, is_causal))()
        theirs = next(iter(baselines.values()))()
        for who, call in list(beside.items()):
            try:
                wrong: object = _errors(call(), theirs, exact)
            except RuntimeError as error:
                wrong = error
            if wrong:
                print(f"not timed: {who} beside {group}, {name}: {wrong}")
                del beside[who]
        wrong = _errors(timed(), theirs, exact)
        assert not wrong, (group, name, wrong)

    return BenchCase(group, name, timed, {**baselines}, 0.0, verify, beside=beside)


def _errors(results: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> list[list[float]]:
    """Of the results that are too far from the exact ones, the error and that of torch's."""
    wrong = []
    for found, other, right in zip(results, theirs, exact, strict=True):
        errors = [(x.double() - right.double()).abs().max().item() for x in (found, other)]
        if not errors[0] <= tolerance(DTYPE, errors[1], right.abs().max().item()):  # NaN too
            wrong.append(errors)
    return wrong


def _exact(merged: Tensor | None, is_causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    if merged is not None and merged.dtype != torch.bool:
        merged = merged.double()
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(q, k, v, merged, 0.0, is_causal and merged is None)
    return output.transpose(1, 2).to(DTYPE)


def _memory(options: argparse.Namespace) -> Report:
    """Peak memory beside inputs and results of a call with averaged weights."""
    if not HAS_GPU:
        return skipped("there is no CUDA device")
    lines, values = [], {}
    mode = Mode(DTYPE, weights=True, device=DEVICE)
    for cell in MODULES:
        peaks = {}
        for name, module in modules(cell, mode)._asdict().items():
            peaks[name] = allocated_on_gpu(inference(module, cell, mode))
        lines.append(f"{cell}: ours {peaks['ours']:.0f} MiB, torch {peaks['theirs']:.0f} MiB")
        values[str(cell)] = peaks
    return Report(lines, values)


REPORTS = {"memory of averaged weights": _memory}

"""What `bench_module` measures beside the ratios to torch: shares of what the machine can do, and torch.compile."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_mha
from fused_mha.benchmark import attention_cells
from fused_mha.benchmark.harness import GroupBar, Report, interleave, skipped
from fused_mha.benchmark.module_cells import (
    QUICK_SELF_ATTENTION,
    SELF_ATTENTION,
    SMALL,
    Cell,
    Mode,
    ModuleCall,
    Run,
    assert_close,
    inference,
    modules,
)
from fused_mha.benchmark.yardsticks import fma_peak, read_bandwidth, share_of

PEAK_SHARE = GroupBar(0.75, 0.85)  # of the first cell
READ_SHARE = 0.7
COMPILED = 0.95  # eager's time over compiled's: no slower, but for what two equal contenders differ by
COMPILED_CELLS = (Cell(8, 128, 128, 256, 8), SMALL[0])
DECODING = tuple(attention_cells.Cell(8, 12, 1, S, 64) for S in (4096, 8192))


def fma_share(options: argparse.Namespace) -> Report:
    """Operations a second of the projections and the core over the machine's, in the same rounds."""
    try:
        peak = fma_peak(options.threads)
    except RuntimeError as error:
        return skipped(str(error))
    lines, cells = [], []
    for cell in QUICK_SELF_ATTENTION if options.quick else SELF_ATTENTION:
        call = inference(modules(cell, Mode()).ours, cell, Mode())
        speed, highest, share = share_of(peak, call, cell.flops, options.seconds / 2)
        bar = "" if cells else f" (at least {PEAK_SHARE.at_least:.0%}, aim {PEAK_SHARE.aim:.0%})"
        lines.append(f"{cell}: {speed:.0f} GF/s of {highest:.0f}, {share:.0%}{bar}")
        cells.append({"name": str(cell), "gflops": speed, "peak_gflops": highest, "share": share})
    return Report(lines, {"cells": cells, **PEAK_SHARE._asdict()}, cells[0]["share"] >= PEAK_SHARE.at_least)


def compiled(options: argparse.Namespace) -> Report:
    """`torch.compile` beside eager: the example's model with our module, and the module alone, ours and torch's.

    The bar is that of the model: what a compiled call costs by itself, some 15 us for one linear layer too, is for a
    module alone a large part of a small call.
    """
    backend = "aot_eager" if options.quick else "inductor"  # which compiles C++, for many seconds
    contenders: list[tuple[str, Callable[[Callable[[nn.Module], nn.Module]], Run]]] = []
    for name, training in (("inference", False), ("training step", True)):
        contenders.append((f"{MODEL}, {name}", functools.partial(_model_call, training)))
        for cell in QUICK_SELF_ATTENTION if options.quick else COMPILED_CELLS:
            for whose in ("ours", "torch's"):
                make = functools.partial(_module_call, cell, whose == "ours", training)
                contenders.append((f"{whose} alone, {cell}, {name}", make))
    lines, rows = [], []
    for name, make in contenders:
        torch.compiler.reset()  # or a second size would be compiled for any size
        runs = {"eager": make(lambda module: module), "compiled": make(lambda module: _compile(module, backend))}
        assert_close(runs["compiled"](), runs["eager"]())
        rounds = interleave(runs, options.seconds)
        ms = {contender: statistics.median(turn[contender] for turn in rounds) for contender in runs}
        ratio = statistics.median(turn["eager"] / turn["compiled"] for turn in rounds)
        times = "  ".join(f"{contender} {time:.3f}" for contender, time in ms.items())
        bar = f" (bar {COMPILED:.2f})" if name.startswith(MODEL) else ""
        lines.append(f"{name}: {ratio:.2f}x{bar}  ms: {times}")
        rows.append({"name": name, "ms": ms, "ratio": ratio, "has_bar": bool(bar)})
    passes = all(row["ratio"] >= COMPILED for row in rows if row["has_bar"])
    return Report(lines, {"backend": backend, "cells": rows, "bar": COMPILED}, passes)


MODEL = "the example's model"


def _compile(module: nn.Module, backend: str) -> nn.Module:
    compiled: Any = torch.compile(module, backend=backend)
    return compiled


def _module_call(cell: Cell, is_ours: bool, training: bool, wrap: Callable[[nn.Module], nn.Module]) -> Run:
    mode = Mode(training=training)
    pair = modules(cell, mode)
    return ModuleCall(cell, mode).of(wrap(pair.ours if is_ours else pair.theirs))


def _model_call(training: bool, wrap: Callable[[nn.Module], nn.Module]) -> Run:
    """The model of examples/train_text_model.py in its default sizes, but for the embedding of the characters."""
    torch.manual_seed(0)
    N, L, E, heads, layers, characters = 16, 64, 192, 6, 2, 90
    layer = nn.TransformerEncoderLayer(E, heads, 4 * E, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(E), enable_nested_tensor=False)
    model = nn.ModuleDict({"encoder": encoder, "next_character": nn.Linear(E, characters)}).train(training)
    fused_mha.convert(model)
    x, mask = torch.randn(N, L, E), nn.Transformer.generate_square_subsequent_mask(L)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["next_character"](self.parts["encoder"](x, mask=mask, is_causal=True))

    forward = wrap(Model())
    targets = torch.randint(characters, (N * L,))

    def call() -> tuple[Tensor, ...]:
        if not training:
            with torch.no_grad():
                return (forward(x),)
        nn.functional.cross_entropy(forward(x).flatten(0, 1), targets).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for parameter in model.parameters():
            parameter.grad = None
        return tuple(gradients)

    return call


def decoding(options: argparse.Namespace) -> Report:
    """Bytes of key and value that one query reads a second, over what the machine can read, in the same rounds."""
    lines, rows = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for cell in attention_cells.QUICK_DECODING if options.quick else DECODING:
            given = attention_cells.tensors(cell, dtype).inputs
            call = attention_cells.forward(attention_cells.ours(), given)
            assert_close(call(), attention_cells.forward(attention_cells.sdpa(), given)())
            size = given[1].nbytes + given[2].nbytes
            try:
                bandwidth = read_bandwidth(options.threads, size)
            except RuntimeError as error:
                return skipped(str(error))
            speed, highest, share = share_of(bandwidth, call, size, options.seconds)
            name = f"{cell}, {str(dtype).removeprefix('torch.')}"
            lines.append(f"{name}: {speed:.1f} GB/s of {highest:.1f}, {share:.0%} (bar {READ_SHARE:.0%})")
            rows.append({"name": name, "gigabytes": speed, "read_gigabytes": highest, "share": share})
    return Report(lines, {"cells": rows, "bar": READ_SHARE}, all(row["share"] >= READ_SHARE for row in rows))


REPORTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "share of the multiply-add peak, fp32 inference": fma_share,
    "torch.compile": compiled,
    "decoding": decoding,
}

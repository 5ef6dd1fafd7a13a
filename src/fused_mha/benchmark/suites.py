"""The named suites and a user's own shapes, as cases of the harness: `command` runs them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from fused_mha.benchmark import attention_cases, module_cases
from fused_mha.benchmark.attention_cells import Cell as AttentionCell
from fused_mha.benchmark.cuda_cases import module_cases_on
from fused_mha.benchmark.harness import BenchCase
from fused_mha.benchmark.module_cells import Cell, Mode

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "autocast": torch.float32,  # the module's own; it computes in bf16
}
QUICK_CELL, QUICK_ATTENTION_CELL = Cell(4, 128, 128, 384, 6), AttentionCell(4, 6, 128, 128, 64)
GROWING = {
    "inference": Mode(),
    "inference, averaged weights": Mode(weights=True),
    "training step": Mode(training=True),
}
DECODING = (module_cases.TOKEN, "one query, forward")  # the groups


class Suite(NamedTuple):
    """A choice of cases, and what it is."""

    summary: str
    cases: Callable[[], Iterator[BenchCase]]


def _quick() -> Iterator[BenchCase]:
    """Every kind of call at one small size, by the best instruction set alone."""
    for call in module_cases.CALLS:
        if call.mode.isa is None:
            cells = (QUICK_CELL,) if call.cells == module_cases.MAIN else call.quick
            yield from module_cases.module_cases([call._replace(cells=cells)])
    for call in attention_cases.CALLS:
        if call.isa is None and call.cells == attention_cases.MAIN:
            yield attention_cases.attention_case(call, QUICK_ATTENTION_CELL)


def _decode() -> Iterator[BenchCase]:
    return itertools.chain(
        module_cases.module_cases(call for call in module_cases.CALLS if call.group in DECODING),
        attention_cases.attention_cases(call for call in attention_cases.CALLS if call.group in DECODING),
    )


def growing_cells() -> list[Cell]:
    """The sizes of the suite `growth`."""
    return [Cell(1, L, L, 512, 8) for L in (128, 256, 512, 1024, 2048, 4096)]


def _growth() -> Iterator[BenchCase]:
    for group, mode in GROWING.items():
        for cell in growing_cells():
            yield module_cases.module_case(group, str(cell), cell, mode, 1.0)


SUITES = {
    "quick": Suite("every kind of call at one small size, in about a minute", _quick),
    "module": Suite("the module: inference, training, weights, masks, dropout, half types", module_cases.module_cases),
    "attention": Suite("attention on split heads, forward and backward", attention_cases.attention_cases),
    "decode": Suite("one token and eight tokens, and one query beside a long cache", _decode),
    "growth": Suite("time and memory from 128 to 4,096 tokens, with weights and in training", _growth),
    "cuda": Suite("the module on a CUDA device", lambda: module_cases_on("cuda", torch.bfloat16)),
}


def own_cases(cells: Sequence[Cell], dtype: str, mode: Mode) -> Iterator[BenchCase]:
    """The user's sizes in one mode, whose dtype is named."""
    words = [
        dtype,
        "training step" if mode.training else "inference",
        f"padding {mode.padding:g}" if mode.padding else "",
        "causal" if mode.causal else "",
        "weights" if mode.weights else "",
        f"dropout {mode.dropout:g}" if mode.dropout else "",
    ]
    mode = mode._replace(dtype=DTYPES[dtype], autocast=dtype == "autocast")
    for cell in cells:
        yield module_cases.module_case(", ".join(filter(None, words)), str(cell), cell, mode, 1.0)

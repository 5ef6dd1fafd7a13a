"""The module on a GPU against torch's, in bf16 and fp32: the suite `cuda`, and a part of `benchmarks/bench_cuda.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fused_mha.benchmark.harness import DROPOUT, BenchCase
from fused_mha.benchmark.module_cases import HALF, module_case
from fused_mha.benchmark.module_cells import Cell, Mode

WEIGHTS_BARS = {  # of averaged weights, in inference and bf16
    Cell(8, 512, 512, 768, 12): 1.5,
    Cell(1, 4096, 4096, 1024, 16): 3.0,
}
MODULES = tuple(WEIGHTS_BARS)
SMALL_MODULES = (Cell(1, 16, 16, 256, 8), Cell(8, 64, 64, 256, 8))
QUICK_MODULES = (Cell(2, 20, 20, 64, 4),)
MODULE_BAR = 0.97


def module_cases_on(device: str, dtype: torch.dtype, *, quick: bool = False) -> Iterator[BenchCase]:
    """Every mode at every size, a small one with ``quick``; ``dtype`` is the half type."""
    large, small = (QUICK_MODULES, QUICK_MODULES) if quick else (MODULES, SMALL_MODULES)
    plain = Mode(dtype, device=device)
    for cell in large:
        for name, mode in _modes(plain).items():
            bar = WEIGHTS_BARS.get(cell, MODULE_BAR) if name == "weights" and mode.dtype == dtype else MODULE_BAR
            yield _case("module", cell, name, mode, bar)
    for cell in small:
        for name, mode in _small_modes(plain).items():
            yield _case("small module", cell, name, mode, 1.0)


def _modes(plain: Mode) -> dict[str, Mode]:
    single = plain._replace(dtype=torch.float32)
    train = plain._replace(training=True)
    small = _small_modes(plain)
    return {
        **{name: mode for name, mode in small.items() if not mode.training},
        "causal, padding": plain._replace(causal=True, padding=HALF),
        **{name: mode for name, mode in small.items() if mode.training},
        "train, causal, padding": train._replace(causal=True, padding=HALF),
        "train, dropout": train._replace(dropout=DROPOUT),
        "train, dropout, weights": train._replace(dropout=DROPOUT, weights=True),
        "fp32, weights": single._replace(weights=True),
        "fp32, plain": single,
        "fp32, padding": single._replace(padding=HALF),
        "fp32, train, plain": single._replace(training=True),
        "fp32, train, padding": single._replace(training=True, padding=HALF),
    }


def _small_modes(plain: Mode) -> dict[str, Mode]:
    kinds = {"plain": plain, "weights": plain._replace(weights=True), "padding": plain._replace(padding=HALF)}
    return {**kinds, **{f"train, {name}": mode._replace(training=True) for name, mode in kinds.items()}}


def _case(group: str, cell: Cell, name: str, mode: Mode, bar: float) -> BenchCase:
    steps = "training step" if mode.training else "inference"
    return module_case(f"{group}, {steps}", f"{cell}, {name}", cell, mode, bar)

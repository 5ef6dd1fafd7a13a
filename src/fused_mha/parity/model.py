"""A user's own model before and after `convert`; `python -m fused_mha.parity --model` prints what comes of it."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fused_mha import ConversionReport, convert, revert
from fused_mha.parity.results import Result, judged
from fused_mha.testing import Comparison, compare
from fused_mha.testing.cases import name_of

Mode = Literal["training", "evaluation", "inference"]
MODES: tuple[Mode, ...] = get_args(Mode)
EXPECTED = "expected a factory that returns (model, inputs) or (model, inputs, keywords)"


class Example(NamedTuple):
    """A model and a call of it."""

    model: nn.Module
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]


class Pair(NamedTuple):
    """One model with torch's modules and with ours."""

    before: Example
    after: nn.Module
    report: ConversionReport

    @property
    def dtype(self) -> torch.dtype:
        """That of the first attention module's parameters."""
        return next(self.after.get_submodule(self.report.changed[0]).parameters()).dtype


def load(specification: str) -> Example:
    """Call the factory that ``specification`` names.

    Args:
        specification: ``package.module:factory``, of a module that can be imported. The factory takes nothing and
            returns (model, inputs) or (model, inputs, keywords): inputs are a tensor or a tuple of the positional
            arguments, or a dict of keyword arguments alone.

    Returns:
        The model and its arguments.

    Raises:
        ValueError: ``specification`` names no such factory, or the factory returns something else.
    """
    module_name, separator, attribute = specification.partition(":")
    if not (separator and module_name and attribute):
        raise ValueError(f"expected package.module:factory, got {specification!r}")
    try:
        factory = importlib.import_module(module_name)
        for name in attribute.split("."):
            factory = getattr(factory, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{specification!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"{specification!r}: {EXPECTED}, got {type(factory).__name__}, which can't be called")
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        kinds = [type(item).__name__ for item in made] if isinstance(made, tuple) else type(made).__name__
        raise ValueError(f"{specification!r}: {EXPECTED}; it returned {kinds}")
    model, inputs = made[:2]
    keywords = made[2] if len(made) == 3 else {}
    if isinstance(inputs, Mapping):
        inputs, keywords = (), {**inputs, **keywords}
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Example(model, inputs, dict(keywords))


def pair(example: Example, device: str, dtype: torch.dtype | None) -> Pair:
    """Copies of the model before and after `convert`; modules that are ours already are torch's before.

    Args:
        example: the model and a call of it.
        device: of both copies and the inputs.
        dtype: of floating parameters and inputs; None for those that they have.

    Returns:
        Both models, and what was converted.

    Raises:
        ValueError: there is nothing to convert, or `revert` refuses.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    before = copy.deepcopy(example.model).to(device, dtype)
    revert(before)
    after = copy.deepcopy(before)
    report = convert(after)
    if not report.changed:
        reasons = "".join(f"; {name or '(root)'}: {reason}" for name, reason in report.skipped.items())
        raise ValueError(f"nothing to convert: {type(before).__name__} has no torch.nn.MultiheadAttention{reasons}")
    inputs = tuple(moved(value) for value in example.inputs)
    keywords = {name: moved(value) for name, value in example.keywords.items()}
    return Pair(Example(before, inputs, keywords), after, report)


def run_mode(models: Pair, mode: Mode, seed: int) -> Result:
    """Compare outputs and, but in inference, the gradients of the inputs and of all parameters."""

    def comparisons() -> list[Comparison]:
        (before, inputs, keywords), after = models.before, models.after
        for model in (before, after):
            model.train(mode == "training")
        with torch.no_grad() if mode == "inference" else contextlib.nullcontext():
            return compare(after, before, *inputs, seed=seed, **keywords)

    return judged(f"{name_of(models.dtype)}, {mode}", mode, models.dtype, comparisons)

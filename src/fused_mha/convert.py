"""`convert` and `revert`: swap `nn.MultiheadAttention` and `MultiHeadAttention` inside a model, in place.

Users call them, before they shard, parametrize or script.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.activation import MultiheadAttention as TorchAttention

from fused_mha.module.multi_head_attention import MultiHeadAttention, ensure_forward_hook, remove_forward_hook

NameFilter = Callable[[str], bool]

FORWARD_REPLACED = "its forward was replaced on the instance"


class ConversionReport(NamedTuple):
    """What `convert` or `revert` did to a model; `print` it.

    `changed` lists the names of the modules that were swapped, every name of a module that is tied; `skipped` holds
    the reason by name for those that were left alone. The root's name is the empty string.

    Examples:
        >>> print(fused_mha.convert(nn.ModuleList([nn.MultiheadAttention(16, 4)])))
        changed 1, skipped 0
          changed  0
    """

    changed: list[str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"changed {len(self.changed)}, skipped {len(self.skipped)}"]
        lines += [f"  changed  {name or '(root)'}" for name in self.changed]
        lines += [f"  skipped  {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert(model: nn.Module, *, name_filter: NameFilter | None = None) -> ConversionReport:
    """Turn every `torch.nn.MultiheadAttention` in ``model``, itself included, into `MultiHeadAttention`, in place.

    Each module stays the same object with the same Parameters: live optimizers, ties, hooks and references held
    elsewhere go on. So does what `torch.compile` has compiled: it is compiled anew in its next call, all of it in this
    process, for which a conversion calls `torch.compiler.reset`. Subclasses are left alone, and so are modules whose
    ``forward`` was replaced. Convert before you parametrize, shard or script.

    Args:
        model: any module.
        name_filter: takes a module's dotted name, as in ``named_modules()``; a module is converted if it is true of
            one of its names.

    Returns:
        The names of the converted modules and the reasons for those left alone.

    Raises:
        TypeError: ``model`` is not an `nn.Module`.

    Examples:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), num_layers=2)
        >>> fused_mha.convert(model).changed
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    changed: list[str] = []
    skipped: dict[str, str] = {}
    swaps: list[nn.Module] = []
    for module, names in _modules_with_names(model):
        reason = _why_not_convertible(module, names, name_filter)
        if reason is None:
            swaps.append(module)
            changed += names
        elif reason:
            skipped.update(dict.fromkeys(names, reason))
    for module in swaps:
        module.__class__ = MultiHeadAttention
        ensure_forward_hook(module)
    if swaps:
        _forget_compiled_graphs()
    return ConversionReport(changed, skipped)


def revert(model: nn.Module, *, name_filter: NameFilter | None = None) -> ConversionReport:
    """Turn every `MultiHeadAttention` in ``model``, itself included, into `torch.nn.MultiheadAttention`, in place.

    Takes modules that `convert` made and those built as ours alike, and removes the forward pre-hook that keeps
    `nn.TransformerEncoderLayer` from bypassing our forward. What was compiled is compiled anew, as after `convert`.

    Args:
        model: any module.
        name_filter: as for `convert`.

    Returns:
        The names of the reverted modules, and those left alone because their ``forward`` was replaced.

    Raises:
        TypeError: ``model`` is not an `nn.Module`.
        ValueError: a subclass of `MultiHeadAttention` (also one that parametrization made), which torch's class can't
            express, or a module with options that it does not have, or of `parallel.context_parallel`; nothing was
            changed.

    Examples:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), num_layers=2)
        >>> report = fused_mha.convert(model)
        >>> fused_mha.revert(model).changed
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    changed: list[str] = []
    skipped: dict[str, str] = {}
    swaps: list[nn.Module] = []
    for module, names in _modules_with_names(model):
        if not isinstance(module, MultiHeadAttention) or not _passes(names, name_filter):
            continue
        if type(module) is not MultiHeadAttention:
            raise ValueError(
                f"{names[0] or '(root)'} is a {type(module).__name__}, a subclass that torch.nn.MultiheadAttention "
                "can't express (remove parametrizations first); nothing was changed"
            )
        if module.options is not None:
            raise ValueError(
                f"{names[0] or '(root)'} has options that torch.nn.MultiheadAttention can't express, "
                f"{module.options.described()}; nothing was changed"
            )
        if module.context is not None:
            raise ValueError(
                f"{names[0] or '(root)'} attends over a sequence that is sharded over ranks, which "
                "torch.nn.MultiheadAttention can't; nothing was changed"
            )
        if "forward" in vars(module):
            skipped.update(dict.fromkeys(names, FORWARD_REPLACED))
            continue
        swaps.append(module)
        changed += names
    for module in swaps:
        module.__class__ = TorchAttention
        remove_forward_hook(module)
    if swaps:
        _forget_compiled_graphs()
    return ConversionReport(changed, skipped)


def _forget_compiled_graphs() -> None:
    # Any compiled function may call the model. Torch before 2.12 does not see that a module's class is another, and
    # every torch can be told not to look (`guard_filter_fn`).
    if "torch._dynamo" in sys.modules:  # without it nothing was compiled, and its import takes a second
        torch.compiler.reset()


def _modules_with_names(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return list(names.items())


def _passes(names: list[str], name_filter: NameFilter | None) -> bool:
    return name_filter is None or any(name_filter(name) for name in names)


def _why_not_convertible(module: nn.Module, names: list[str], name_filter: NameFilter | None) -> str | None:
    """None if the module can be converted, the reason if not, "" if it is no concern of ours."""
    if isinstance(module, torch.jit.ScriptModule):
        is_attention = getattr(module, "original_name", "") == "MultiheadAttention"
        return "compiled by torch.jit.script: convert before scripting" if is_attention else ""
    if not isinstance(module, TorchAttention) or isinstance(module, MultiHeadAttention):
        return ""
    if not _passes(names, name_filter):
        return "not selected by name_filter"
    if type(module) is not TorchAttention:
        return f"a subclass, {type(module).__module__}.{type(module).__qualname__}: its own behaviour would be lost"
    if "forward" in vars(module):
        return FORWARD_REPLACED
    return None

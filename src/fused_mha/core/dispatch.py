"""Which back end serves a call: the order, the reasons against each, the override and the explanation.

`functional.attention` and `plans` call `choose` and `run`, `linear` and `one_call` `allows`,
`explanation` `explain_inputs`; users call `backend`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from fused_mha.backends import cpu, sdpa, triton
from fused_mha.backends.capability import Backend, Capability, not_supported_reasons
from fused_mha.core import masks, reference
from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.modes import autocast_is_on


def _run_reference(inputs: AttentionInputs) -> AttentionResult:
    device = inputs.query.device.type
    if autocast_is_on(device):  # it computes the half types in fp32; entering costs as much as two small ops
        with torch.autocast(device, enabled=False):
            return AttentionResult(*reference.attention(*inputs))
    return AttentionResult(*reference.attention(*inputs))


def _reference_notes(inputs: AttentionInputs) -> list[str]:
    return ["the scores are built as an (N, H, L, S) tensor"]


REFERENCE = Backend(
    name="reference",
    summary="readable PyTorch, on any device, in any dtype and under any transform",
    capability=Capability(),
    run=_run_reference,
    notes=_reference_notes,
)

# In order of preference: the first that can serve a call does.
BACKENDS: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, sdpa.BACKEND, REFERENCE)


class _Override(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # no attribute of the class, which torch.compile would see the first change hide


_override = _Override()


class Explanation(NamedTuple):
    """Which back end serves a call, and why the others do not; `print` it.

    `chosen` is None where an explicit choice cannot serve. `reasons` holds, by back end in order of preference, why it
    cannot serve, empty where it can. `notes` says what the chosen one does that costs memory. `projections` says how a
    module's inputs and output are projected; it is None for a call without a module. `left` says why a back end leaves
    a call that it could serve to the next.

    Examples:
        >>> explanation = fused_mha.explain(fused_mha.MultiHeadAttention(16, 4), torch.randn(5, 2, 16))
        >>> explanation.reasons["sdpa"]
        ['it returns no attention weights (need_weights=True)']
    """

    chosen: str | None
    reasons: dict[str, list[str]]
    notes: list[str]
    override: str | None
    projections: str | None = None
    left: Mapping[str, str] = MappingProxyType({})

    def __str__(self) -> str:
        how = f"by fused_mha.backend({self.override!r})" if self.override else "the first that can serve"
        lines = [f"back end: {self.chosen or 'none'} ({how})"]
        lines += [f"  note: {note}" for note in self.notes]
        if self.projections is not None:
            lines.append(f"  projections: {self.projections}")
        for name, reasons in self.reasons.items():
            if name != self.chosen:
                left = f", but leaves it: {self.left[name]}" if name in self.left else ""
                lines.append(f"  {name}: " + ("cannot: " + "; ".join(reasons) if reasons else f"could serve{left}"))
        return "\n".join(lines)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one back end for the calls of this thread inside a ``with`` block; contexts nest.

    An explicit choice is never replaced: a call that the back end cannot serve raises RuntimeError with the reasons. A
    forward that is recomputed in the backward pass (activation checkpointing) needs the context there too.

    Args:
        name: ``"cpu"``, ``"triton"``, ``"sdpa"`` or ``"reference"``; `python -m fused_mha.info` lists them.

    Yields:
        None.

    Raises:
        ValueError: there is no back end of that name.

    Examples:
        >>> with fused_mha.backend("reference"):
        ...     output, weights = module(x, x, x)
    """
    known = [candidate.name for candidate in BACKENDS]
    if name not in known:
        raise ValueError(f"backend must be one of {known}; got {name!r}")
    previous = _override.name
    _override.name = name
    try:
        yield
    finally:
        _override.name = previous


def forced() -> str | None:
    """The name that `backend` forces for this thread."""
    return _override.name


def allows(candidate: Backend) -> bool:
    """Whether a back end is among those that calls are given to, and no other is forced for this thread."""
    return _override.name in (None, candidate.name) and any(known is candidate for known in BACKENDS)


def _may_serve(candidate: Backend, inputs: AttentionInputs) -> bool:
    """Whether a call that a back end can serve is given to it."""
    return _override.name == candidate.name or (_override.name is None and candidate.leaves(inputs) is None)


def explain_inputs(inputs: AttentionInputs) -> Explanation:
    """The choice for these inputs with the reasons of every back end; computes nothing."""
    reasons = {candidate.name: not_supported_reasons(candidate.capability, inputs) for candidate in BACKENDS}
    able = [candidate for candidate in BACKENDS if not reasons[candidate.name]]
    left = {candidate.name: str(why) for candidate in able if (why := candidate.leaves(inputs)) is not None}
    for candidate in able:
        if _may_serve(candidate, inputs):
            return Explanation(candidate.name, reasons, candidate.notes(inputs), _override.name, left=left)
    return Explanation(None, reasons, [], _override.name, left=left)


def choose(inputs: AttentionInputs) -> Backend:
    """The first back end that can serve these inputs; RuntimeError, with every reason, if none can."""
    for candidate in BACKENDS:
        if not not_supported_reasons(candidate.capability, inputs) and _may_serve(candidate, inputs):
            return candidate
    raise RuntimeError(f"no back end can serve this call.\n{explain_inputs(inputs)}")


def run(back_end: Backend, inputs: AttentionInputs) -> AttentionResult:
    """Compute attention on a back end; one that reads hidden keys is given zeros in their place."""
    padding = inputs.key_padding_mask
    if padding is not None and back_end.capability.reads_hidden_keys:
        key, value = masks.without_hidden_keys(inputs.key, inputs.value, padding)
        inputs = inputs._replace(key=key, value=value)
    return back_end.run(inputs)

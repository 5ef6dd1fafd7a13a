"""What serves an eager call of a kind that has come before: looked up, not checked and chosen anew. On CUDA that is
every call, on the CPU a small one of a module.

`attention`, `varlen_attention`, `one_call` and the steps ask. Here the short way and the general one meet: the general
one serves the first call of each kind, and what it finds out is kept. A kind is all that the checks of `inputs`,
`dispatch` and the kernels look at: of every tensor the sizes, strides, dtype, device and its address modulo 16, the
flags, and which back end is forced. Calls under a compiler, a tracer, a transform or a dispatch mode, those of other
tensors than plain ones, and those with a mask (of `attention`, a bias too) that needs a gradient, have no kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_mha.backends.capability import Backend, Served, ServedTensors
from fused_mha.core import dispatch
from fused_mha.core.inputs import AttentionInputs, AttentionResult
from fused_mha.core.memory import PLAIN_OR_NONE, Recent, memory_of_each
from fused_mha.core.modes import is_eager, is_recorded

DEVICE = "cuda"  # elsewhere a call's kernel takes longer than its checks, or has a way of its own
MOST_KINDS = 1024  # a few kilobytes each
_LEARN = 5  # the first tensors of a call, which may need a gradient: query, key, value, sinks and slopes
_CONSTANTS = (bool, int, float, str, type(None))  # types of flags that stay what they are
Kind = tuple[Any, ...]
Serves = TypeVar("Serves")
_kept: dict[Kind, Any] = {}
_recent: dict[tuple[Any, ...], Recent[Any]] = {}  # by the key of a `Place`


def kind_of(tensors: Sequence[Tensor | None], flags: tuple[Any, ...], may_learn: int = _LEARN) -> Kind | None:
    """The kind of a call, or None.

    Args:
        tensors: of the call, not yet checked: first those that may need a gradient.
        flags: its other arguments.
        may_learn: how many tensors may need a gradient.

    Returns:
        What `find` and `keep` take.
    """
    if not is_eager():
        return None
    memory = memory_of_each(tensors, DEVICE)
    if memory is None:
        return None
    if is_recorded(*tensors[may_learn:]):
        return None
    return *memory, *flags, dispatch.forced(), _precision(tensors[0])


def _precision(x: Tensor | None) -> str | bool | None:
    """Of products, where that is a question."""
    is_float = x is not None and x.dtype == torch.float32
    return torch.backends.cuda.matmul.fp32_precision if is_float else None


def find(tensors: Sequence[Tensor | None], flags: tuple[Any, ...], may_learn: int = _LEARN) -> tuple[Kind | None, Any]:
    """The kind of a call, or None, as `kind_of`; and what serves such calls, None where that is not known."""
    place = place_of(tensors, (flags, may_learn, _precision(tensors[0])))
    if place is None:
        return None, None
    if (found := place.find()) is not None:
        return found
    kind = kind_of(tensors, flags, may_learn)
    served = None if kind is None else _kept.get(kind)
    if kind is not None and served is not None:
        place.note((kind, served))
    return kind, served


class Place(NamedTuple):
    """Where it is noted what serves an eager call of plain tensors, by its flags, its roles and its sizes."""

    key: tuple[Any, ...]
    given: list[Tensor]  # none of them twice
    recent: Recent[Any] | None

    def find(self) -> Any:
        """What was noted for such a call, or None."""
        return None if self.recent is None else self.recent.find(self.given)

    def note(self, found: Any) -> None:
        """Know this from now on."""
        if len(_recent) >= MOST_KINDS:
            _recent.clear()
        _recent.setdefault(self.key, Recent()).note(self.given, found)


def place_of(tensors: Sequence[Tensor | None], flags: tuple[Any, ...]) -> Place | None:
    """That of a call with these tensors and flags; None where the general way has to serve it."""
    if not is_eager() or not PLAIN_OR_NONE.issuperset(map(type, tensors)):
        return None
    given, roles = [x for x in tensors if x is not None], [x is None for x in tensors]
    if len({*map(id, given)}) < len(given):
        firsts: dict[Tensor | None, int] = {}  # tensors hash by identity
        roles += [firsts.setdefault(x, i) for i, x in enumerate(tensors)]
        given = [x for x in firsts if x is not None]
    key = (flags, dispatch.forced(), torch.is_grad_enabled(), *roles, *[x.shape for x in given])
    try:
        return Place(key, given, _recent.get(key))
    except TypeError:  # a flag that cannot be hashed
        return None


def keep(kind: Kind | None, back_end: Backend, inputs: AttentionInputs) -> Served | None:
    """What serves this call and the later ones of its kind: what the back end that was chosen for it has for such, or
    the back end itself.
    """
    if kind is None or not all(map(is_constant, _flags_of(inputs))):
        return None
    return remember(kind, back_end.served(inputs) or _by(back_end, inputs))


def _by(back_end: Backend, inputs: AttentionInputs) -> Served:
    masking, others = inputs[5:8], inputs[12:-2]  # no tensors, which would be kept alive

    def served(*tensors: Any) -> AttentionResult:
        query, key, value, sinks, slopes, attn_mask, padding, bias_k, bias_v, *offsets = tensors
        of_heads = (bias_k, bias_v, sinks, slopes)
        found = (query, key, value, attn_mask, padding, *masking, *of_heads, *others, *(offsets or (None, None)))
        return dispatch.run(back_end, AttentionInputs._make(found))

    return served


def remember(kind: Kind, served: Serves) -> Serves:
    """What serves calls of a kind."""
    if len(_kept) >= MOST_KINDS:
        forget()
    _kept[kind] = served
    return served


def forget() -> None:
    """Forget every kind, for tests and benchmarks that change what `dispatch` or the kernels go by."""
    _kept.clear()
    _recent.clear()


def run(inputs: AttentionInputs) -> AttentionResult:
    """Compute attention of inputs that were checked."""
    kind = None
    if inputs.query.device.type == DEVICE and not torch.compiler.is_compiling():
        tensors = tensors_of(inputs)
        kind, served = find(tensors, _flags_of(inputs))
        if served is not None:
            return served(*tensors)
    back_end = dispatch.choose(inputs)
    served = keep(kind, back_end, inputs)
    return dispatch.run(back_end, inputs) if served is None else served(*tensors_of(inputs))


def tensors_of(inputs: AttentionInputs) -> ServedTensors:
    """The tensors of a call."""
    query, key, value, attn_mask, key_padding_mask = inputs[:5]
    of_heads, biases = (inputs.sinks, inputs.alibi_slopes), (inputs.bias_k, inputs.bias_v)
    return query, key, value, *of_heads, attn_mask, key_padding_mask, *biases, *inputs[-2:]


def _flags_of(inputs: AttentionInputs) -> tuple[Any, ...]:
    return inputs[5:8] + inputs[12:-2]


def is_constant(flag: object) -> bool:
    """Whether a flag that is equal to this one at a later call means the same."""
    return all(map(is_constant, flag)) if type(flag) is tuple else type(flag) in _CONSTANTS

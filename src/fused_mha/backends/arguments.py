"""From the checked inputs of a call to the arguments of the operator `attention`; back ends with kernels call this."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_mha.core import masks
from fused_mha.core.inputs import AttentionInputs
from fused_mha.ops.schema import Arguments, placed_seed


class _Place(threading.local):
    def __init__(self) -> None:
        # No attribute of the class, which torch.compile would see the first change hide.
        self.heads: tuple[int, int] | None = None


_place = _Place()


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of a call's dropout, from torch's generator; None where nothing is dropped."""
    if not dropout_p:
        return None
    whole = torch.iinfo(torch.int64)
    seed = torch.randint(whole.min, whole.max, (2,), dtype=torch.int64, device=device)
    if _place.heads is None:
        return seed
    if device.type != "cpu":
        raise RuntimeError(f"dropout of heads that are spread over ranks is on the CPU alone so far; got {device}")
    return placed_seed(seed, 0, 0, *_place.heads)


@contextlib.contextmanager
def heads_of_a_longer_call(first_head: int, heads: int) -> Iterator[None]:
    """The heads of this thread's calls are some of a longer call, whose dropout they draw; other ranks have the rest.

    Args:
        first_head: the place of the first one.
        heads: of the longer call.

    Yields:
        None.
    """
    _place.heads = first_head, heads
    try:
        yield
    finally:
        _place.heads = None


def arguments_of(
    inputs: AttentionInputs, draw: Callable[[float, torch.device], Tensor | None] = draw_seed
) -> Arguments:
    """The operator's arguments; draws the seed of a call with dropout."""
    return Arguments(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.attn_mask,
        inputs.key_padding_mask,
        inputs.bias_k,
        inputs.bias_v,
        draw(inputs.dropout_p, inputs.query.device),
        inputs.sinks,
        inputs.alibi_slopes,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        *_band(inputs),
        (inputs.alibi_slopes is not None or inputs.cu_seqlens_q is not None)
        and inputs.causal_alignment == "bottom_right",
        inputs.add_zero_attn,
        float(inputs.dropout_p),
        float(inputs.scale),
        None if inputs.softcap is None else float(inputs.softcap),
        inputs.need_weights,
        inputs.average_attn_weights,
        inputs.weights_of_heads,
    )


def _band(inputs: AttentionInputs) -> tuple[int | None, int | None]:
    """The first and the last key that query i sees, less i; None is no limit. `masks.outside_band` draws the same.

    Of packed sequences, whose lengths are in a tensor, the operator shifts them.
    """
    left, right = masks.limits(inputs.window)
    if inputs.is_causal:
        right = 0
    is_shifted = inputs.causal_alignment == "bottom_right" and inputs.cu_seqlens_q is None
    diagonal = inputs.key.shape[1] - inputs.query.shape[1] if is_shifted else 0
    return None if left is None else diagonal - left, None if right is None else diagonal + right

"""`warm_up`: compiles the kernels of calls that are yet to come, for servers that may not stall at the first of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_mha.backends import triton
from fused_mha.functional import attention
from fused_mha.multi_head_attention import MultiHeadAttention

HeadSize = int | tuple[int, int]
_MASKS = ("attn_mask", "key_padding_mask")
_FLAGS = ("is_causal", "dropout_p", "need_weights", "average_attn_weights", "return_lse", "bias_kv", "add_zero_attn")
CALLS: tuple[Mapping[str, object], ...] = (
    {"key_padding_mask": torch.bool},
    {"need_weights": True},
    {"key_padding_mask": torch.bool, "need_weights": True},
)


class _Heads(NamedTuple):
    """Of which size they are, and how many; what a module adds to each call."""

    D: int
    D_v: int
    H: int
    H_kv: int
    dtype: torch.dtype
    device: torch.device
    of_module: Mapping[str, object]


def warm_up(
    target: nn.Module | Iterable[HeadSize],
    *,
    calls: Sequence[Mapping[str, object]] = CALLS,
    lengths: Sequence[int] = (128,),
    batch_size: int = 1,
    backward: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cuda",
) -> int:
    """Compile ahead what calls of attention on a GPU will run, with a line to stderr for each.

    Triton compiles a kernel at the first call that needs it, for seconds, and keeps it on disk for later processes.
    One variant serves all lengths, batches and numbers of heads. A mask has others: for rows that are no multiples of
    16 bytes, and for calls of 2^24 scores or more, where it is searched for tiles to skip: give ``lengths`` and
    ``batch_size`` of each kind. Calls that go to torch's own kernels compile nothing.

    Args:
        target: a model, for all `MultiHeadAttention` in it as they are now (dtype, device, training mode); or head
            sizes, D or (D, D_v).
        calls: what is given to each call beside query, key and value: the dtypes of ``attn_mask`` and
            ``key_padding_mask``, and of `attention`'s flags ``is_causal``, ``dropout_p``, ``need_weights``,
            ``average_attn_weights``, ``return_lse``, ``add_zero_attn``; ``bias_kv=True`` gives both biases.
        lengths: L = S of calls that are made of each.
        batch_size: N of these.
        backward: compile the gradients too; if None, those of a model in training mode.
        dtype: of head sizes; a model has its own.
        device: of head sizes; a model has its own.

    Returns:
        How many calls were made; 0 where there is no CUDA core.

    Raises:
        ValueError: a model without `MultiHeadAttention` or on another device than a GPU, head sizes without a dtype, an
            argument of ``calls`` that is not known.

    Example:
        >>> model = nn.TransformerEncoderLayer(512, 8, batch_first=True)
        >>> fused_mha.convert(model)  # doctest: +SKIP
        >>> fused_mha.warm_up(model.cuda().eval(), calls=[{"key_padding_mask": torch.bool}])  # doctest: +SKIP
        fused_mha.warm_up: 1 of 1: 8 heads of 64, float32, key_padding_mask=bool: 3.1 s
        1
    """
    for call in calls:
        for name, value in call.items():
            if name not in (*_MASKS, *_FLAGS):
                raise ValueError(f"calls must name {', '.join((*_MASKS, *_FLAGS))}; got {name!r}")
            if name in _MASKS and not isinstance(value, torch.dtype):
                raise ValueError(f"calls must give {name} by its dtype, such as torch.bool; got {value!r}")
    if isinstance(target, nn.Module):
        heads = _heads_of(target)
        backward = target.training if backward is None else backward
    elif dtype is None:
        raise ValueError("dtype must be given with head sizes; got None")
    else:
        heads = [_of_size(size, dtype, torch.device(device)) for size in target]
    if (reason := _reason_against()) is not None:
        _say(f"nothing to compile: {reason}")
        return 0
    if isinstance(target, nn.Module) and (elsewhere := {x.device.type for x in heads} - {triton.DEVICE}):
        raise ValueError(f"target must be on a GPU; its parameters are on {', '.join(sorted(elsewhere))}")
    jobs = list(dict.fromkeys((of, tuple(call.items()), length) for of in heads for call in calls for length in lengths))
    ...

"""What the operators take and give; `fake`, `fallback` and `autograd` say the rest of each.

`attention` returns the output (N, L, H, D_v), the weights or an empty tensor, the log-sum-exp (N, H, L) and `stats`
(2, N, H, L), the rows' maxima and sums, which `attention_backward` takes back. Beside a gradient of the log-sum-exp,
output and stats may be those of rows that have keys in other calls too: the gradients are of this call's part. One that
is not asked for is an empty tensor. `attention_gradients` is what the library computes of it: the gradients of query,
key and value, of the mask (N|1, H|1, L, S), of the scores summed over the queries (N, H, S), of the biases and the
sinks for each batch element, (N, H_kv, D) and (N, H), and of the distances that ALiBi goes by, summed over the queries,
(N, H, S).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fused_mha", "DEF")

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? bias_k, "
    "Tensor? bias_v, Tensor? seed, Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt? first_visible, SymInt? last_visible, bool bottom_right, bool add_zero_attn, float dropout_p, float scale, "
    "float? softcap, bool need_weights, bool average_attn_weights, int[]? weights_of_heads"
)
_GRADIENTS = ", ".join(["Tensor"] * 9)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

LIBRARY.define(f"attention({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=TAGS)
LIBRARY.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_weights, Tensor? grad_lse, Tensor output, Tensor stats, "
    f"bool mask_grad, bool padding_grad, {_INPUTS}) -> ({_GRADIENTS})",
    tags=TAGS,
)
LIBRARY.define(
    "attention_gradients(Tensor grad_output, Tensor? grad_weights, Tensor? grad_lse, Tensor output, Tensor stats, "
    f"bool mask_grad, bool columns_grad, {_INPUTS}) -> ({_GRADIENTS})",
    tags=TAGS,
)
LIBRARY.define("dropout_mask(Tensor seed, SymInt[] shape, float dropout_p) -> Tensor", tags=TAGS)

attention = torch.ops.fused_mha.attention.default
attention_backward = torch.ops.fused_mha.attention_backward.default
attention_gradients = torch.ops.fused_mha.attention_gradients.default
dropout_mask = torch.ops.fused_mha.dropout_mask.default


def drawn_probability(dropout_p: float) -> float:
    """With which 16 random bits drop an element: a multiple of 2^-16, 1 only where ``dropout_p`` is.

    `csrc/generic/philox.h` has the same. What is kept is scaled by 1 / (1 - this), so that dropout changes no mean.
    """
    return min(int(dropout_p * 65536 + 0.5), 65535) / 65536 if dropout_p < 1.0 else 1.0


def placed_seed(seed: Tensor, first_query: int, first_key: int, first_head: int, heads: int) -> Tensor:
    """The seed of a call that is a part of a longer one, whose dropout keeps what that of the longer call keeps there.

    Args:
        seed: (2), int64, of the longer call.
        first_query: the place of the first query in it.
        first_key: of the first key; a multiple of 8.
        first_head: of the first head.
        heads: H of the longer call.

    Returns:
        (6), int64.
    """
    place = torch.tensor((first_query, first_key, first_head, heads), dtype=torch.int64, device=seed.device)
    return torch.cat((seed, place))


def own_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask as a backward may save it: callers fill theirs anew for the next call.

    A copy, unless it is an attn_mask, (.., L, S), that is larger than the query: then autograd notices a change. One of
    inference mode has to be copied.
    """
    if mask is None or mask.requires_grad:
        return mask
    if mask.dim() <= 2:
        return mask.clone()
    sizes = (mask.numel(), query.numel())
    is_small = all(type(size) is int for size in sizes) and sizes[0] <= sizes[1]  # no guard on symbolic sizes
    is_of_inference = not torch.compiler.is_compiling() and mask.is_inference()  # which Dynamo cannot ask
    return mask.clone() if is_small or is_of_inference else mask


TENSORS = 12  # the first fields of `Arguments`


class Arguments(NamedTuple):
    """What forward and backward share, in the order of the op's arguments.

    Query i sees the keys i + first_visible to i + last_visible; None is no limit. Its position, for `alibi_slopes`,
    is i, or with `bottom_right` i + S - L.

    With `cu_seqlens_q` and `cu_seqlens_k` the rows are those of packed sequences, N = 1: number n has the queries
    cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1, and the keys likewise. There is no attn_mask and there are no weights
    then. i, L and S are those of a sequence, and `bottom_right` holds for the visible keys too.
    """

    query: Tensor  # (N, L, H, D)
    key: Tensor  # (N, S, H_kv, D)
    value: Tensor  # (N, S, H_kv, D_v)
    attn_mask: Tensor | None  # (N|1, H|1, L|1, S)
    key_padding_mask: Tensor | None  # (N, S)
    bias_k: Tensor | None  # (H_kv, D)
    bias_v: Tensor | None  # (H_kv, D_v)
    seed: Tensor | None  # (2), int64; (6) of a part of a longer call, as `placed_seed` makes it
    sinks: Tensor | None  # (H)
    alibi_slopes: Tensor | None  # (H)
    cu_seqlens_q: Tensor | None  # (sequences + 1), int64
    cu_seqlens_k: Tensor | None  # likewise
    first_visible: int | None
    last_visible: int | None
    bottom_right: bool
    add_zero_attn: bool
    dropout_p: float
    scale: float
    softcap: float | None
    need_weights: bool
    average_attn_weights: bool
    weights_of_heads: Sequence[int] | None = None  # whose weights are returned, in this order; all without

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None], numbers: Iterable[Any]) -> Arguments:
        """From the first fields and the others."""
        fields: list[Any] = [*tensors, *numbers]
        return cls(*fields)

    @property
    def columns(self) -> int:
        """S', the number of keys with the virtual ones."""
        return self.key.shape[1] + int(self.bias_k is not None) + int(self.add_zero_attn)

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """Of the weights; without them, of an empty tensor in their place."""
        N, L, H, _ = self.query.shape
        if not self.need_weights:
            return (0,)
        heads = len(self.weights_of_heads) if self.weights_of_heads else H
        return (N, L, self.columns) if self.average_attn_weights else (N, heads, L, self.columns)

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """In which sums are kept: fp32, or fp64 for fp64."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

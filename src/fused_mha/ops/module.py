"""The operators of a whole module, `multi_head_attention` and its gradient: projections and attention in one call.

`one_call` calls them. The forward returns the output in query's layout, the weights or an empty tensor, and what the
gradient takes back: the projections in one piece, the heads and the statistics of the softmax; empty without ``keep``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_mha.ops import schema
from fused_mha.ops.flop_counter import count_scores, register_flop_formula

_INPUTS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor? in_weight, Tensor? query_weight, Tensor? key_weight, "
    "Tensor? value_weight, Tensor? in_bias, Tensor out_weight, Tensor? out_bias, Tensor? bias_k, Tensor? bias_v, "
    "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "bool batch_first, int num_heads, "
    "bool is_causal, bool add_zero_attn, float dropout_p, float scale, bool need_weights, bool average_attn_weights"
)
GRADIENTS = 12  # of the first tensors

schema.LIBRARY.define(
    f"multi_head_attention({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", tags=schema.TAGS
)
schema.LIBRARY.define(
    "multi_head_attention_backward(Tensor? grad_output, Tensor? grad_weights, Tensor projections, Tensor heads, "
    f"Tensor stats, {_INPUTS}, int wanted) -> ({', '.join(['Tensor'] * GRADIENTS)})",
    tags=schema.TAGS,
)
multi_head_attention = torch.ops.fused_mha.multi_head_attention.default
multi_head_attention_backward = torch.ops.fused_mha.multi_head_attention_backward.default


class Call(NamedTuple):
    """The arguments of the operators, in their order: tensors, those that may get a gradient first, and numbers."""

    query: Tensor  # (N, L, E), (L, N, E) without batch_first, or (L, E)
    key: Tensor | None  # of length S, as value; None where it is query, and value too
    value: Tensor | None  # None where it is key and in_weight is given
    in_weight: Tensor | None  # (3E, E), or else the next three
    query_weight: Tensor | None  # (E, E)
    key_weight: Tensor | None  # (E, kdim)
    value_weight: Tensor | None  # (E, vdim)
    in_bias: Tensor | None  # (3E)
    out_weight: Tensor  # (E, E)
    out_bias: Tensor | None  # (E)
    bias_k: Tensor | None  # (1, 1, E)
    bias_v: Tensor | None  # (1, 1, E)
    attn_mask: Tensor | None  # (N|1, H|1, L|1, S)
    key_padding_mask: Tensor | None  # (N, S), or (S) unbatched
    seed: Tensor | None  # (2), int64
    cu_seqlens_q: Tensor | None  # (sequences + 1), int64: the rows of unbatched input are those of packed sequences
    cu_seqlens_k: Tensor | None
    batch_first: bool
    num_heads: int
    is_causal: bool
    add_zero_attn: bool
    dropout_p: float
    scale: float
    need_weights: bool
    average_attn_weights: bool

    @classmethod
    def of(cls, fields: Iterable[Any]) -> Call:
        """From all of them in order."""
        arguments: list[Any] = [*fields]
        return cls(*arguments)

    def sequences(self, x: Tensor) -> Tensor:
        """A tensor of the caller's layout as (N, length, E); its own inverse but for unbatched ones."""
        if self.query.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        key = self.query if self.key is None else self.key
        return self.query, key, key if self.value is None else self.value

    def sizes(self) -> tuple[Any, Any, Any, Any]:
        """N, L, S and E."""
        N, L, E = self.sequences(self.query).shape
        return N, L, self.sequences(self.inputs()[1]).shape[1], E

    def weights_shape(self) -> tuple[Any, ...]:
        """Of the attention weights; without them, of an empty tensor in their place."""
        if not self.need_weights:
            return (0,)
        N, L, S, _ = self.sizes()
        shape = (L, S + int(self.bias_k is not None) + int(self.add_zero_attn))
        shape = shape if self.average_attn_weights else (self.num_heads, *shape)
        return shape if self.query.dim() == 2 else (N, *shape)

    def gradient_shapes(self) -> list[tuple[Any, ...]]:
        """Of the tensors that may get a gradient; that of a linear map's bias need not be given."""
        shapes: list[tuple[Any, ...]] = [(0,) if x is None else x.shape for x in self[:GRADIENTS]]
        E = self.query.shape[-1]
        shapes[self._fields.index("in_bias")], shapes[self._fields.index("out_bias")] = (3 * E,), (E,)
        return shapes

    def new_kept(self, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised tensors for the projections, the heads and the statistics; empty ones without ``keep``."""
        (N, L, S, E), H = self.sizes(), self.num_heads
        new_empty, accumulator = self.query.new_empty, torch.promote_types(self.query.dtype, torch.float32)
        return (
            new_empty((N * E * (L + 2 * S),) if keep else (0,)),
            new_empty((N, L, H, E // H) if keep else (0,)),
            new_empty((2, N, H, L) if keep else (0,), dtype=accumulator),
        )


TENSORS = Call._fields.index("batch_first")  # the first fields


@torch.library.register_fake(multi_head_attention)
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *fields, keep = arguments
    call = Call.of(fields)
    query = call.query
    return query.new_empty(query.shape), query.new_empty(call.weights_shape()), *call.new_kept(keep)


@torch.library.register_fake(multi_head_attention_backward)
def _fake_backward(
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    projections: Tensor,
    heads: Tensor,
    stats: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *fields, wanted = rest
    shapes = Call.of(fields).gradient_shapes()
    return tuple(projections.new_empty(shape if wanted >> i & 1 else (0,)) for i, shape in enumerate(shapes))


@register_flop_formula(torch.ops.fused_mha.multi_head_attention, get_raw=True)
def _flops(query: Tensor, *others: Any, **_: Any) -> int:
    """The products of the projections and two of the attention; hidden keys count too."""
    call = Call.of((query, *others[: len(Call._fields) - 1]))
    N, L, S, E = call.sizes()
    of_keys = sum(x.shape[-1] for x in call.inputs()[1:])
    scores = count_scores(N, L, S, call.cu_seqlens_q, call.cu_seqlens_k)
    return 2 * E * (N * (2 * L * E + S * of_keys) + 2 * scores)


@register_flop_formula(torch.ops.fused_mha.multi_head_attention_backward, get_raw=True)
def _backward_flops(*arguments: Any, **_: Any) -> int:
    """Two products for each one of the projections, five of the attention."""
    call = Call.of(arguments[5 : 5 + len(Call._fields)])
    N, L, S, E = call.sizes()
    of_keys = sum(x.shape[-1] for x in call.inputs()[1:])
    scores = count_scores(N, L, S, call.cu_seqlens_q, call.cu_seqlens_k)
    return 2 * E * (N * (4 * L * E + 2 * S * of_keys) + 5 * scores)

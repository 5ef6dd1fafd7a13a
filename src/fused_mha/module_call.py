"""A call of a module as `one_call` hands it to the C++ library and `module_gradients` differentiates it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fused_mha.inputs import default_scale
from fused_mha.ops.schema import Settings


class Layout(NamedTuple):
    """How the caller's sequences lie; here they are (N, length, E)."""

    is_batched: bool
    batch_first: bool

    def sequences(self, x: Tensor) -> Tensor:
        """The caller's tensor as (N, length, E)."""
        if not self.is_batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def given(self, x: Tensor) -> Tensor:
        """The inverse of `sequences`."""
        if not self.is_batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def new(self, like: Tensor, N: int, length: int, E: int) -> Tensor:
        """An uninitialised tensor of the caller's layout; no view, since autograd lets none be changed in place."""
        if not self.is_batched:
            return like.new_empty((length, E))
        return like.new_empty((N, length, E) if self.batch_first else (length, N, E))


class Call(NamedTuple):
    """What a call has beside tensors."""

    layout: Layout
    shared_inputs: int  # of query, key and value: 3 are one tensor, the last 2 are, or each stands alone (1)
    num_heads: int
    is_causal: bool
    add_zero_attn: bool
    dropout_p: float
    need_weights: bool
    average_attn_weights: bool


class Tensors(NamedTuple):
    """The tensors of a call, those that may get a gradient first."""

    query: Tensor  # in the caller's layout, as key and value
    key: Tensor
    value: Tensor
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
    key_padding_mask: Tensor | None  # (N, S)
    seed: Tensor | None  # (2)

    @classmethod
    def of(cls, tensors: Iterable[Any]) -> Tensors:
        """From all of them in order."""
        fields: list[Any] = [*tensors]
        return cls(*fields)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    def reach_heads(self) -> bool:
        """Of flags in the tensors' places, whether any before the out-projection is set."""
        return any(self[:8]) or bool(self.bias_k) or bool(self.bias_v)

    def in_weights(self) -> tuple[Tensor, ...]:
        """The packed weight, or the three."""
        if self.in_weight is not None:
            return (self.in_weight,)
        return tuple(weight for weight in self[4:7] if weight is not None)

    def settings(self, call: Call) -> Settings:
        """What the attention takes."""
        head_dim = self.out_weight.shape[1] // call.num_heads
        return Settings(
            self.attn_mask,
            self.key_padding_mask,
            None if self.bias_k is None else self.bias_k.reshape(-1, head_dim),
            None if self.bias_v is None else self.bias_v.reshape(-1, head_dim),
            self.seed,
            None,
            0 if call.is_causal else None,
            call.add_zero_attn,
            call.dropout_p,
            default_scale(head_dim),
            call.need_weights,
            call.average_attn_weights,
        )


def ranges(call: Call, t: Tensors) -> list[tuple[int, int]]:
    """Which of query, key and value (0, 1, 2) one product makes: from and to."""
    if t.in_weight is None or call.shared_inputs == 1:
        return [(0, 1), (1, 2), (2, 3)]
    return [(0, 3)] if call.shared_inputs == 3 else [(0, 1), (1, 3)]


def split(products: Iterable[Tensor], E: int, num_heads: int) -> list[Tensor]:
    """Query, key and value (N, length, H, D) of what products made (N, length, E or more)."""
    parts = (x.view(*x.shape[:2], x.shape[2] // E, num_heads, E // num_heads).unbind(2) for x in products)
    return [*itertools.chain.from_iterable(parts)]

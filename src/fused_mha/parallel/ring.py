"""`ring_attention`: attention over a sequence that is sharded over ranks, whose keys and values go round in a ring.

Users call it; `context` does for a module. While a rank attends to the keys that it holds, they are on their way to the
next rank. What a rank finds for each part of the keys is merged by the log-sum-exp. In the backward, the gradients of
keys and values follow them round, and come home.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_mha.backends import cpu, triton
from fused_mha.backends.arguments import draw_seed
from fused_mha.backends.capability import not_supported_reasons
from fused_mha.core.inputs import AttentionInputs, check_attention
from fused_mha.core.modes import as_autocast_casts, autocast_is_on
from fused_mha.ops import schema
from fused_mha.ops.schema import Arguments
from fused_mha.parallel.groups import Group, Passing, check_on_every_rank, described, group_of
from fused_mha.parallel.zigzag import Block, blocks

_SEED_UNIT = 8  # keys that dropout draws for at once


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group = None,
    *,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`fused_mha.attention` over a sequence of which each rank holds a part, as `shard` cuts it.

    Every rank's keys and values go round all R ranks, and each rank keeps two parts of them at a time, whatever R is.
    The result is that of one process on the whole sequence, within rounding, and so are the gradients. Dropout keeps
    the same weights as on one process if the ranks' generators are in the same state, as under one `torch.manual_seed`.

    Args:
        query: (N, L / R, H, D), this rank's part of the queries.
        key: (N, L / R, H_kv, D), of the keys; H is a multiple of H_kv.
        value: (N, L / R, H_kv, D_v), of the values.
        group: the ranks of the ring: a process group, a mesh of one dimension, or None for all ranks.
        key_padding_mask: (N, L / R), of the mask; bool (True = ignore) or floating (added to the scores, without a
            gradient).
        is_causal: hide the future, by the places in the whole sequence.
        sinks: (H), a logit for each head that takes probability and gives no value, the same on every rank. Its
            gradient is of this rank's queries alone.
        dropout_p: probability of dropping a weight.
        scale: factor of the scores; 1 / sqrt(D) if None.
        softcap: c: a scaled score s becomes c * tanh(s / c).

    Returns:
        (N, L / R, H, D_v), this rank's part of the output.

    Raises:
        RuntimeError: shapes, dtypes or devices that disagree, on one rank or between ranks, on each of them.
        ValueError: an odd length; with dropout, one that 16 does not divide; ``dropout_p`` outside [0, 1]; a bad
            ``softcap``; a mask that needs a gradient.

    Examples:
        >>> query, key, value = (fused_mha.parallel.shard(x) for x in (query, key, value))
        >>> output = fused_mha.parallel.ring_attention(query, key, value, is_causal=True)

    Source:
        Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv 2310.01889).
    """

    def inputs() -> AttentionInputs:
        casts = autocast_is_on(query.device.type)
        return check_attention(
            *(as_autocast_casts(x) if casts else x for x in (query, key, value)),
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            sinks=sinks,
            dropout_p=dropout_p,
            scale=scale,
            softcap=softcap,
        )

    ranks = group_of(group)
    found: list[AttentionInputs] = []

    def check() -> str:
        found.append(inputs())
        return checked(found[0])

    check_on_every_rank(ranks, query, "ring_attention", check)
    return attend(found[0], ranks)


def attend(inputs: AttentionInputs, group: dist.ProcessGroup) -> Tensor:
    """The output for checked inputs that agree on every rank of the group."""
    seed = draw_seed(inputs.dropout_p, inputs.query.device)
    heads = (0, inputs.query.shape[2]) if seed is None or len(seed) == 2 else (int(seed[4]), int(seed[5]))
    call = _Call(group, heads, inputs.is_causal, float(inputs.dropout_p), float(inputs.scale), inputs.softcap)
    return _Ring.apply(inputs.query, inputs.key, inputs.value, inputs.key_padding_mask, inputs.sinks, seed, call)


def checked(inputs: AttentionInputs) -> str:
    """What must be the same on every rank; raises where this rank's call is not possible."""
    query, key, value, padding = inputs.query, inputs.key, inputs.value, inputs.key_padding_mask
    length = query.shape[1]
    if key.shape[1] != length:
        raise RuntimeError(f"key must have query's length, {length}, in a ring; got {tuple(key.shape)}")
    if length % 2 or not length:
        raise ValueError(f"a rank's part must have an even length, of two chunks; got {length}")
    if inputs.dropout_p and length // 2 % _SEED_UNIT:
        raise ValueError(f"with dropout, {2 * _SEED_UNIT} must divide the length of a rank's part; got {length}")
    back_end = cpu.BACKEND if query.device.type == "cpu" else triton.BACKEND
    if reasons := not_supported_reasons(back_end.capability, inputs):
        raise RuntimeError(
            f"ring_attention needs the back end {back_end.name}, which cannot serve: {'; '.join(reasons)}"
        )
    if padding is not None and padding.requires_grad:
        raise ValueError("key_padding_mask must not need a gradient in a ring")
    tensors = {"query": query, "key": key, "value": value, "key_padding_mask": padding, "sinks": inputs.sinks}
    return described(tensors, {name: getattr(inputs, name) for name in ("is_causal", "dropout_p", "scale", "softcap")})


class _Call(NamedTuple):
    """What the blocks of a call share beside its tensors."""

    group: dist.ProcessGroup
    heads: tuple[int, int]  # the first one's place among all, where other ranks have other heads; how many there are
    is_causal: bool
    dropout_p: float
    scale: float
    softcap: float | None

    def steps(self, length: int) -> list[list[Block]]:
        """The blocks of this rank, step by step: first those of its own keys, last those of the next rank's."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return [
            [*blocks(rank, (rank - step) % size, size, length, self.is_causal, by_chunk=self.dropout_p > 0)]
            for step in range(size)
        ]

    def arguments(
        self, block: Block, query: Tensor, held: list[Tensor], sinks: Tensor | None, seed: Tensor | None
    ) -> Arguments:
        """Of the operator, for one block."""
        key, value, *padding = (x[:, slice(*block.keys)] for x in held)
        if seed is not None:
            seed = schema.placed_seed(seed[:2], block.first_query, block.first_key, *self.heads)
        return Arguments(
            query=query[:, slice(*block.queries)],
            key=key,
            value=value,
            attn_mask=None,
            key_padding_mask=padding[0] if padding else None,
            bias_k=None,
            bias_v=None,
            seed=seed,
            sinks=sinks if block.keys[0] == 0 else None,
            alibi_slopes=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            first_visible=None,
            last_visible=0 if block.is_causal else None,
            bottom_right=False,
            add_zero_attn=False,
            dropout_p=self.dropout_p,
            scale=self.scale,
            softcap=self.softcap,
            need_weights=False,
            average_attn_weights=True,
        )


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        call: _Call,
    ) -> Tensor:
        merged = _Merged(query, value)
        held = [x for x in (key, value, padding) if x is not None]
        steps = call.steps(query.shape[1])
        for step, of_step in enumerate(steps):
            passing = Passing(held, call.group) if step + 1 < len(steps) else None
            for block in of_step:
                of_block = call.arguments(block, query, held, sinks if step == 0 else None, seed)
                output, _, lse, stats = schema.attention(*of_block)
                merged.add(block, output, lse, stats)
            held = held if passing is None else passing.received()
        output = merged.output.to(query.dtype)
        ctx.call = call
        padding = None if padding is None else schema.own_mask(padding, query)
        ctx.save_for_backward(query, key, value, padding, sinks, seed, output, merged.stats)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # autograd cannot follow what ranks pass to each other
            raise RuntimeError("ring_attention has no second derivative: call backward without create_graph=True")
        (grad_output,) = cotangents
        query, key, value, padding, sinks, seed, output, stats = ctx.saved_tensors
        call: _Call = ctx.call
        dtype = torch.promote_types(query.dtype, torch.float32)  # of sums over the ranks
        grad_query: Tensor | None = None
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        grad_lse = torch.zeros_like(stats[0])  # with which a block's gradients are a part of those of whole rows
        held = [x for x in (key, value, padding) if x is not None]
        at_home: list[Tensor] = []  # the gradients of this rank's own keys and values
        following: Passing | None = None  # those of the keys that are held, from the ranks that held them before
        steps = call.steps(query.shape[1])
        for step, of_step in enumerate(steps):
            passing = Passing(held, call.group) if step + 1 < len(steps) else None
            of_keys: list[Tensor | None] = [None, None]
            for block in of_step:
                rows = (slice(None), slice(*block.queries))
                of_block = call.arguments(block, query, held, sinks if step == 0 else None, seed)
                its_lse, its_stats = (x[..., slice(*block.queries)].contiguous() for x in (grad_lse, stats))
                found = schema.attention_backward(
                    grad_output[rows], None, its_lse, output[rows], its_stats, False, False, *of_block
                )
                grad_query = _added(grad_query, query, block.queries, found[0], dtype)
                of_keys = [
                    _added(total, x, block.keys, part, dtype)
                    for total, x, part in zip(of_keys, held, found[1:], strict=False)
                ]
                if grad_sinks is not None and of_block.sinks is not None:
                    grad_sinks += found[7]
            grads = [x for x in of_keys if x is not None]
            if following is not None:
                grads = [grad.add_(earlier) for grad, earlier in zip(grads, following.received(), strict=True)]
            if step == 0:
                at_home = grads
            else:
                following = Passing(grads, call.group)
            held = held if passing is None else passing.received()
        if following is not None:
            at_home = [grad.add_(away) for grad, away in zip(at_home, following.received(), strict=True)]
        assert grad_query is not None
        gradients = (x.to(query.dtype) for x in (grad_query, *at_home))
        return *gradients, None, grad_sinks, None, None


def _added(total: Tensor | None, like: Tensor, places: tuple[int, int], part: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of parts of the rows of a tensor like another; a first part that is the whole is taken as it is."""
    if total is None and places == (0, like.shape[1]):
        return part.to(dtype)
    if total is None:
        total = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    total[:, slice(*places)] += part
    return total


class _Merged:
    """What the rows have of all keys so far, block by block.

    For two parts of the keys with outputs o and log-sum-exps l, l = log(exp(l1) + exp(l2)) and
    o = exp(l1 - l) o1 + exp(l2 - l) o2. A kernel's stats are a maximum and a sum, in units of its own: a row keeps the
    maximum of the part with the larger l, among those where it sees a key, and a sum that makes its log-sum-exp that of
    all parts.
    """

    def __init__(self, query: Tensor, value: Tensor) -> None:
        N, length, H, _ = query.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        self._is_new = True
        self.output = query.new_zeros((N, length, H, value.shape[3]), dtype=dtype)
        self.lse = query.new_full((N, H, length), float("-inf"), dtype=dtype)
        self.stats = query.new_zeros((2, N, H, length), dtype=dtype)

    def add(self, block: Block, output: Tensor, lse: Tensor, stats: Tensor) -> None:
        """Merge what a call found of a block; the first, of all rows, is taken as it is."""
        is_new, self._is_new = self._is_new, False
        if is_new and lse.shape == self.lse.shape:
            self.output, self.lse, self.stats = output.to(self.output.dtype), lse, stats
            return
        rows = slice(*block.queries)
        all_lse, largest, total = self.lse[..., rows], self.stats[0, ..., rows], self.stats[1, ..., rows]
        merged = torch.logaddexp(all_lse, lse)
        is_empty = merged == float("-inf")  # -inf - -inf = NaN
        of_former, of_new = ((x - merged).exp_().masked_fill_(is_empty, 0.0) for x in (all_lse, lse))
        self.output[:, rows].mul_(_per_row(of_former)).addcmul_(output.to(self.output.dtype), _per_row(of_new))
        had_none, has_none = total == 0, stats[1] == 0  # of rows that see a sink at most
        is_taken = ~has_none & ((lse > all_lse) | had_none)
        sums = torch.where(is_taken, stats[1] / of_new, total / of_former)
        total.copy_(sums.masked_fill_(had_none & has_none, 0.0))
        largest.copy_(torch.where(is_taken, stats[0], largest))
        all_lse.copy_(merged)


def _per_row(x: Tensor) -> Tensor:
    """(N, H, L) beside (N, L, H, D)."""
    return x.transpose(1, 2).unsqueeze(-1)

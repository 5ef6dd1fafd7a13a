"""`fused_mha.attention` against torch's `scaled_dot_product_attention`, or the products and softmax it cannot replace.

The suites and `benchmarks/bench_attention.py` measure these cases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_mha.benchmark.attention_cells import (
    DECODING,
    MAIN,
    ODD,
    QUICK,
    QUICK_DECODING,
    QUICK_ODD,
    Attention,
    Cell,
    bmm,
    forced_isa,
    forward,
    forward_backward,
    grad_weights,
    has_isa,
    merged_mask,
    ours,
    sdpa,
    tensors,
)
from fused_mha.benchmark.harness import BAR, DROPOUT, BenchCase, GroupBar, seeded
from fused_mha.core.attention import attention as our_attention
from fused_mha.testing import tolerance


class Call(NamedTuple):
    """One way of calling the core: a group of cells with the bar of their geometric mean."""

    group: str
    bar: GroupBar
    cells: tuple[Cell, ...] = MAIN
    quick: tuple[Cell, ...] = QUICK
    dtype: torch.dtype = torch.float32
    training: bool = False
    weights: bool = False  # averaged, and with a gradient in training
    causal_padding: bool = False  # and half of the keys of every sequence hidden
    dropout: float = 0.0
    isa: str | None = None  # the best if None


CALLS = (
    Call("fp32 forward", GroupBar(2.0, 2.5)),
    Call("fp32 forward, AVX2", GroupBar(1.0, 1.2), isa="avx2"),
    Call("bf16 forward", GroupBar(3.0, 4.5), dtype=torch.bfloat16),
    Call("fp16 forward", GroupBar(4.0, 8.0), dtype=torch.float16),
    Call("forward, averaged weights", GroupBar(4.0, 6.0), weights=True),
    Call("forward, causal and padding", GroupBar(4.0, 8.0), causal_padding=True),
    Call("fp32 forward and backward", GroupBar(1.7, 2.3), training=True),
    Call("bf16 forward and backward", GroupBar(2.0, 3.0), dtype=torch.bfloat16, training=True),
    Call("dropout, forward and backward", GroupBar(5.0, 8.0), training=True, dropout=DROPOUT),
    Call("averaged weights, forward and backward", GroupBar(3.0, 5.0), training=True, weights=True),
    Call("odd shapes, forward", GroupBar(1.2, 1.7), cells=ODD, quick=QUICK_ODD),
    Call("one query, forward", GroupBar(1.0, 1.5), cells=DECODING, quick=QUICK_DECODING),
)


def attention_cases(calls: Iterable[Call] = CALLS, *, quick: bool = False) -> Iterator[BenchCase]:
    """Every call at every size, a small one with ``quick``, as far as this machine has its instruction set."""
    for call in calls:
        if has_isa(call.isa):
            for cell in call.quick if quick else call.cells:
                yield attention_case(call, cell)


def attention_case(call: Call, cell: Cell) -> BenchCase:
    """One call of the core at one size."""
    mine = _ours(call, cell)
    theirs: dict[str, Attention] = {}
    if not call.weights:
        mask = _merged_mask(cell, call.dtype) if call.causal_padding else None
        theirs["sdpa"] = sdpa(dropout=call.dropout, attn_mask=mask)
    if call.weights or call.dropout > 0.0:
        theirs["bmm"] = bmm(weights=call.weights, dropout=call.dropout)
    is_plain = call == Call(call.group, call.bar, call.cells, call.quick)
    return BenchCase(
        call.group,
        str(cell),
        _contender(call, cell, mine),
        {name: _contender(call, cell, attention) for name, attention in theirs.items()},
        BAR,
        lambda: _verify(call, cell, mine, next(iter(theirs.values()))),
        functools.partial(forced_isa, call.isa),
        call=AttentionCall(call, cell),
        flops=cell.flops if is_plain else 0,
    )


class AttentionCall(NamedTuple):
    """A call of the core as data."""

    call: Call
    cell: Cell

    def ours(self) -> Callable[[], tuple[Tensor, ...]]:
        """The call of our core."""
        return _contender(self.call, self.cell, _ours(self.call, self.cell))


def _ours(call: Call, cell: Cell) -> Attention:
    padding = tensors(cell).key_padding_mask if call.causal_padding else None
    return ours(weights=call.weights, dropout=call.dropout, is_causal=call.causal_padding, key_padding_mask=padding)


@functools.cache
def _merged_mask(cell: Cell, dtype: torch.dtype) -> Tensor:
    return merged_mask(cell, tensors(cell).key_padding_mask).to(dtype)


def _contender(
    call: Call, cell: Cell, attention: Attention, dtype: torch.dtype | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """The call, in another dtype if wanted."""
    given = tensors(cell, call.dtype)
    inputs = [x.to(dtype or x.dtype) for x in given.inputs]
    if not call.training:
        return forward(attention, inputs)
    cotangents = (given.grad_output, grad_weights(cell).to(call.dtype)) if call.weights else (given.grad_output,)
    return forward_backward(attention, inputs, [x.to(dtype or x.dtype) for x in cotangents])


def _verify(call: Call, cell: Cell, mine: Attention, theirs: Attention) -> None:
    """Raise AssertionError where a result is further from one of higher precision than torch's own may be."""
    higher = torch.float64 if call.dtype == torch.float32 else torch.float32
    run = _contender(call, cell, mine)
    if call.dropout > 0.0:
        theirs = bmm(weights=call.weights, dropout=call.dropout, kept=_kept(call, cell))
        run = functools.partial(seeded, run)
    exact = _contender(call, cell, theirs, higher)
    check_errors(f"{call.group}, {cell}", call.dtype, _names(call), run, _contender(call, cell, theirs), exact)


def check_errors(case: str, dtype: torch.dtype, names: Sequence[str], *contenders: Callable[[], Any]) -> None:
    """Raise AssertionError where a result is further from an exact one than torch's own may be.

    Args:
        case: what is measured.
        dtype: of the results.
        names: of the results.
        *contenders: of ours, of torch, and of torch in higher precision.
    """
    results, torch_results, exact = (
        dict(zip(names, (x.detach() for x in contender()), strict=True)) for contender in contenders
    )
    for name, oracle in exact.items():
        error, torch_error = (float((x[name].to(oracle.dtype) - oracle).abs().max()) for x in (results, torch_results))
        bound = tolerance(dtype, torch_error, float(oracle.abs().max()))
        assert error <= bound, f"{case}: {name} is off by {error:.2e}, torch's by {torch_error:.2e}, bound {bound:.2e}"


def _names(call: Call) -> list[str]:
    weights = ["weights"] if call.weights else []
    gradients = ["grad_query", "grad_key", "grad_value"] if call.training else []
    return ["output", *weights, *gradients]


def _kept(call: Call, cell: Cell) -> Tensor:
    """What our dropout keeps after `seeded`'s seed, (N, H, L, S); its share has to be the one asked for."""

    def per_head() -> tuple[Tensor, ...]:
        given = tensors(cell, call.dtype)
        result = our_attention(*given.inputs, dropout_p=call.dropout, need_weights=True, average_attn_weights=False)
        assert result.weights is not None
        return (result.weights != 0.0,)

    with torch.no_grad():
        (kept,) = seeded(per_head)
    deviation = math.sqrt(call.dropout * (1.0 - call.dropout) / kept.numel())
    share = 1.0 - float(kept.count_nonzero()) / kept.numel()
    assert abs(share - call.dropout) <= 6.0 * deviation, f"{call.group}: a share of {share} is dropped"
    return kept

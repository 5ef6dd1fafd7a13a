"""What the kernels of the backward are given, and the gradients of a tile of weights; `backward` calls these."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_mha.backends.triton.scores import scores_of, softmax_tile
from fused_mha.backends.triton.tiles import MOST_ROWS, is_kept, load_rows, multiple, rows_of_output

TERMS_UNIT = tl.constexpr(4)  # elements of 16 bytes, where the terms of each packed sequence begin


class Given(NamedTuple):
    """What the gradients are computed from, beside the call; the first, `output` and `cleaned` lie as the output, all
    others are contiguous.
    """

    grad_output: Any  # (N, L, H, D_v)
    grad_weights: Any  # (N, L, S') or (N, H, L, S'), or None
    grad_lse: Any  # (N, H, L) or None
    output: Any  # (N, L, H, D_v)
    stats: Any  # (2, N, H, L)
    terms: Any  # (N, H, 3, L'): the shift, the factor and the delta of each query, which `grad_query` stores
    cleaned: Any  # grad_output with zeros for queries that see nothing, which it stores for the others; None: all see
    named: Any  # the heads that have a gradient of weights, as `preparation.named_heads` writes them; None: all


class Queries(NamedTuple):
    """What is read of a block of queries."""

    rows: Any
    query: Any  # (BLOCK_M, BLOCK_D)
    grad_output: Any  # (BLOCK_M, BLOCK_DV)
    shift: Any
    factor: Any


@triton.jit
def load_queries(call, given, head, rows, is_read, TILE: tl.constexpr):
    """The queries and their deltas, after `grad_query`."""
    at, length = terms_of(call, given, head, rows)
    queries = Queries(
        rows=rows,
        query=load_rows(head.query, call.query_l, rows, is_read, TILE.D, TILE.BLOCK_D),
        grad_output=merged_rows(given.grad_output, call, head, rows, is_read, TILE),
        shift=_load(at, is_read),
        factor=_load(at + length, is_read),
    )
    return queries, _load(at + 2 * length, is_read)


@triton.jit
def _load(at, is_read):
    """Of a block of terms, zeros where it is False: a load that stops there is not of 16 bytes."""
    return tl.load(at) if is_read is None else tl.where(is_read, tl.load(at), 0.0)


@triton.jit
def terms_of(call, given, head, rows):
    """Where the shifts of rows are, and how far from them the factors: L', so that there are whole blocks."""
    if call.place is not None:
        length = (tl.cdiv(call.place.all_queries + (call.N + 1) * TERMS_UNIT, MOST_ROWS) + 1) * MOST_ROWS
        first = (call.place.first_query // TERMS_UNIT + call.place.sequence) * TERMS_UNIT  # with room for the others
        return given.terms + head.h * 3 * length + first + rows, length
    length = tl.cdiv(call.L, MOST_ROWS) * MOST_ROWS
    return given.terms + (head.n * call.H + head.h) * 3 * length + rows, length


@triton.jit
def merged_rows(tensor, call, head, rows, is_read, TILE: tl.constexpr):
    """Rows of a head of the output, or of what lies as the output does."""
    at = rows_of_output(tensor, call, head, TILE)
    return load_rows(at, call.output_l, rows, is_read, TILE.D_V, TILE.BLOCK_DV)


@triton.jit
def place_of_weights(given, head):
    """Of a head among the named ones; -1 if it is none of them."""
    return tl.load(given.named + 1 + head.h)


@triton.jit
def _grad_weights(call, given, head, weights, rows, columns, TILE: tl.constexpr):
    """The gradient of the weights of one head where they are not 0; rows and columns broadcast."""
    if given.named is not None:
        matrix = head.n * tl.load(given.named) + place_of_weights(given, head)
    else:
        matrix = head.n if TILE.AVERAGED else head.n * call.H + head.h
    row_stride = multiple(call.columns, TILE.WEIGHTS_UNIT)
    at = given.grad_weights + (matrix * call.L + rows.to(tl.int64)) * row_stride + columns
    is_read = (rows < call.L) & (columns < call.columns)
    if given.named is not None:
        is_read = is_read & (place_of_weights(given, head) >= 0)
    grad = tl.load(at, mask=is_read, other=0.0).to(tl.float32)
    if TILE.AVERAGED:
        grad /= call.H
    return tl.where(weights == 0.0, 0.0, grad)  # that of log(0) is infinite


@triton.jit
def weights_and_gradients(
    call,
    given,
    head,
    queries,
    key,
    value,
    start,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    BY_KEYS: tl.constexpr,
):
    """Of a tile: the softmax, what dropout keeps of it, the gradients of the softmax, and the scores before ALiBi and
    masks, (rows, BLOCK_N).

    They are (BLOCK_N, rows) if BY_KEYS. Without a value, only what comes through the weights is in the gradients.
    """
    columns = start + tl.arange(0, TILE.BLOCK_N)
    if BY_KEYS:
        i, j = queries.rows[None, :], columns[:, None]
        shift, factor = queries.shift[None, :], queries.factor[None, :]
        products = tl.dot(key, tl.trans(queries.query), input_precision=TILE.PRECISION)
    else:
        i, j = queries.rows[:, None], columns[None, :]
        shift, factor = queries.shift[:, None], queries.factor[:, None]
        products = tl.dot(queries.query, tl.trans(key), input_precision=TILE.PRECISION)
    scores = scores_of(call, products, TILE)
    probabilities = softmax_tile(call, head, shift, factor, scores, i, j, TILE, KIND)
    weights = probabilities
    if call.seed is not None:
        kept = is_kept(call, head, queries.rows, start, TILE)
        if BY_KEYS:
            kept = tl.trans(kept)
        weights = tl.where(kept, probabilities, 0.0)
    if value is None:
        grad = _grad_weights(call, given, head, weights, i, j, TILE)
    else:
        if BY_KEYS:
            grad = tl.dot(value, tl.trans(queries.grad_output), input_precision=TILE.PRECISION)
        else:
            grad = tl.dot(queries.grad_output, tl.trans(value), input_precision=TILE.PRECISION)
        if given.grad_weights is not None:
            grad += _grad_weights(call, given, head, weights, i, j, TILE)
    if call.seed is not None:
        grad = tl.where(kept, grad, 0.0) * call.kept_factor
    return probabilities, weights, grad, scores

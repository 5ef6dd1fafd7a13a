"""The gradients of attention (Dao, arXiv 2307.08691, algorithm 2): keys and values by one kernel, queries by another.

`launch` calls these. Every sum is of one program in a fixed order: no atomics, and equal bits in every run.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_mha.backends.triton.tiles import (
    block_of_queries,
    full,
    head_of,
    kept_weights,
    load_keys,
    load_of_rows,
    load_rows,
    load_values,
    softmax_tile,
    store_rows,
    tile_of_matrices,
    zeros,
)
from fused_mha.backends.triton.visibility import (
    chunk_size,
    edge,
    edge_count,
    next_tile,
    tile_is_visible,
    visible_in_chunk,
    visible_keys,
    visible_rows,
)


class Given(NamedTuple):
    """What the gradients are computed from, beside the call; all contiguous."""

    grad_output: Any  # (N, L, H, D_v)
    grad_weights: Any  # (N, L, S') or (N, H, L, S'), or None
    grad_lse: Any  # (N, H, L) or None
    output: Any  # (N, L, H, D_v)
    stats: Any  # (2, N, H, L)
    deltas: Any  # (N, H, L), what `delta` makes


@triton.jit
def _merged_rows(tensor, call, head, rows, is_read, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head of a contiguous tensor (N, L, H, D)."""
    at = tensor + (head.n * call.L * call.H + head.h) * D
    return load_rows(at, call.H * D, rows, is_read, D, BLOCK_D)


@triton.jit
def _store_merged(tensor, call, head, rows, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    at = tensor + (head.n * call.L * call.H + head.h) * D
    store_rows(at, call.H * D, rows, rows < call.L, values, D, BLOCK_D)


@triton.jit
def _grad_weights(call, given, head, rows, columns, AVERAGED: tl.constexpr):
    """The gradient of the weights of one head; rows and columns broadcast."""
    matrix = head.n if AVERAGED else head.n * call.H + head.h
    at = given.grad_weights + (matrix * call.L + rows.to(tl.int64)) * call.columns + columns
    grad = tl.load(at, mask=(rows < call.L) & (columns < call.columns), other=0.0).to(tl.float32)
    return grad / call.H if AVERAGED else grad


@triton.jit
def _add_to_delta(
    call,
    given,
    head,
    query,
    grad_output,
    rows,
    start,
    total,
    TILE: tl.constexpr,
    EDGES: tl.constexpr,
    AVERAGED: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
):
    columns = start + tl.arange(0, TILE.BLOCK_N)
    key = load_keys(call, head, columns, TILE, EDGES)
    products = tl.dot(query, tl.trans(key), input_precision=TILE.PRECISION)
    weights = softmax_tile(call, head, given.stats, products, rows[:, None], columns[None, :], TILE, EDGES)
    if call.seed is not None:
        weights = tl.where(kept_weights(call, head, rows, start, TILE), weights * call.kept_factor, 0.0)
    if BY_OUTPUT:
        grad = _grad_weights(call, given, head, rows[:, None], columns[None, :], AVERAGED)
    else:
        value = load_values(call, head, columns, TILE, EDGES)
        grad = tl.dot(grad_output, tl.trans(value), input_precision=TILE.PRECISION)
        if given.grad_weights is not None:
            grad += _grad_weights(call, given, head, rows[:, None], columns[None, :], AVERAGED)
    return total + tl.sum(weights * grad, 1)


@triton.jit
def delta(call, given, TILE: tl.constexpr, AVERAGED: tl.constexpr, BY_OUTPUT: tl.constexpr):
    """rowsum(W * dW) less the gradient of the log-sum-exp, which the kernels below subtract from dW, W the weights.

    dW is dO V^T and what comes through the weights. BY_OUTPUT, the first part is taken as rowsum(dO * O), which reads
    no key, but differs from the sum that it stands for by the rounding of O.
    """
    head, first_row = block_of_queries(call, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    grad_output = _merged_rows(given.grad_output, call, head, rows, rows < call.L, TILE.D_V, TILE.BLOCK_DV)
    total = full(0.0, TILE.BLOCK_M)
    if BY_OUTPUT:
        output = _merged_rows(given.output, call, head, rows, rows < call.L, TILE.D_V, TILE.BLOCK_DV)
        total += tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    if not BY_OUTPUT or given.grad_weights is not None:
        query = load_rows(head.query, call.query_l, rows, rows < call.L, TILE.D, TILE.BLOCK_D)
        tiles = visible_keys(call, head, first_row, TILE)
        for chunk in range(tiles.whole_begin, tiles.whole_end, chunk_size(call, TILE.BLOCK_N)):
            bits, count = visible_in_chunk(call, head, first_row, chunk, tiles.whole_end, TILE, True)
            for i in range(count):
                start = chunk + next_tile(call, i, bits) * TILE.BLOCK_N
                total = _add_to_delta(
                    call, given, head, query, grad_output, rows, start, total, TILE, False, AVERAGED, BY_OUTPUT
                )
                bits &= bits - 1
        for i in range(edge_count(tiles, call, TILE)):
            start = edge(i, tiles, call, TILE)
            total = _add_to_delta(
                call, given, head, query, grad_output, rows, start, total, TILE, True, AVERAGED, BY_OUTPUT
            )
    if given.grad_lse is not None:
        total -= load_of_rows(given.grad_lse, call, head, rows)
    at = (head.n * call.H + head.h) * call.L + rows
    tl.store(given.deltas + at, total, mask=rows < call.L)


@triton.jit
def _grad_scores(
    call,
    given,
    head,
    query,
    key,
    value,
    grad_output,
    rows,
    start,
    TILE: tl.constexpr,
    EDGES: tl.constexpr,
    AVERAGED: tl.constexpr,
    BY_KEYS: tl.constexpr,
):
    """The weights of a tile and the gradients of its scores, (rows, BLOCK_N), or (BLOCK_N, rows) if BY_KEYS."""
    columns = start + tl.arange(0, TILE.BLOCK_N)
    if BY_KEYS:
        i, j = rows[None, :], columns[:, None]
        products = tl.dot(key, tl.trans(query), input_precision=TILE.PRECISION)
        grad = tl.dot(value, tl.trans(grad_output), input_precision=TILE.PRECISION)
    else:
        i, j = rows[:, None], columns[None, :]
        products = tl.dot(query, tl.trans(key), input_precision=TILE.PRECISION)
        grad = tl.dot(grad_output, tl.trans(value), input_precision=TILE.PRECISION)
    softmax = softmax_tile(call, head, given.stats, products, i, j, TILE, EDGES)
    if given.grad_weights is not None:
        grad += _grad_weights(call, given, head, i, j, AVERAGED)
    weights = softmax
    if call.seed is not None:
        kept = kept_weights(call, head, rows, start, TILE)
        if BY_KEYS:
            kept = tl.trans(kept)
        weights = tl.where(kept, softmax * call.kept_factor, 0.0)
        grad = tl.where(kept, grad * call.kept_factor, 0.0)
    grad = softmax * (grad - load_of_rows(given.deltas, call, head, i))
    return weights, tl.where(softmax == 0.0, 0.0, grad)  # a hidden row's log-sum-exp may have NaN for a gradient


@triton.jit
def _add_grad_query(
    call,
    given,
    head,
    query,
    grad_output,
    rows,
    start,
    total,
    TILE: tl.constexpr,
    EDGES: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    columns = start + tl.arange(0, TILE.BLOCK_N)
    key = load_keys(call, head, columns, TILE, EDGES)
    value = load_values(call, head, columns, TILE, EDGES)
    _, grad = _grad_scores(call, given, head, query, key, value, grad_output, rows, start, TILE, EDGES, AVERAGED, False)
    return tl.dot(grad.to(key.dtype), key, total, input_precision=TILE.PRECISION)


@triton.jit
def grad_query(call, given, result, TILE: tl.constexpr, AVERAGED: tl.constexpr):
    """The gradients of a block of queries, (N, L, H, D)."""
    head, first_row = block_of_queries(call, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    query = load_rows(head.query, call.query_l, rows, rows < call.L, TILE.D, TILE.BLOCK_D)
    grad_output = _merged_rows(given.grad_output, call, head, rows, rows < call.L, TILE.D_V, TILE.BLOCK_DV)
    total = zeros(TILE.BLOCK_M, TILE.BLOCK_D)
    tiles = visible_keys(call, head, first_row, TILE)
    for chunk in range(tiles.whole_begin, tiles.whole_end, chunk_size(call, TILE.BLOCK_N)):
        bits, count = visible_in_chunk(call, head, first_row, chunk, tiles.whole_end, TILE, True)
        for i in range(count):
            start = chunk + next_tile(call, i, bits) * TILE.BLOCK_N
            total = _add_grad_query(call, given, head, query, grad_output, rows, start, total, TILE, False, AVERAGED)
            bits &= bits - 1
    for i in range(edge_count(tiles, call, TILE)):
        start = edge(i, tiles, call, TILE)
        total = _add_grad_query(call, given, head, query, grad_output, rows, start, total, TILE, True, AVERAGED)
    _store_merged(result, call, head, rows, total * call.scale, TILE.D, TILE.BLOCK_D)


class Sums(NamedTuple):
    """The sums over the queries that belong to a block of keys."""

    key: Any  # (BLOCK_N, BLOCK_D)
    value: Any  # (BLOCK_N, BLOCK_DV)
    columns: Any  # (BLOCK_N), of one head's scores


@triton.jit
def _add_grad_key(
    call,
    given,
    head,
    key,
    value,
    first_row,
    first_column,
    sums,
    TILE: tl.constexpr,
    EDGES: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    is_read = rows < call.L if EDGES else None
    query = load_rows(head.query, call.query_l, rows, is_read, TILE.D, TILE.BLOCK_D)
    grad_output = _merged_rows(given.grad_output, call, head, rows, is_read, TILE.D_V, TILE.BLOCK_DV)
    weights, grad = _grad_scores(
        call, given, head, query, key, value, grad_output, rows, first_column, TILE, EDGES, AVERAGED, True
    )
    return Sums(
        key=tl.dot(grad.to(query.dtype), query, sums.key, input_precision=TILE.PRECISION),
        value=tl.dot(weights.to(query.dtype), grad_output, sums.value, input_precision=TILE.PRECISION),
        columns=sums.columns + tl.sum(grad, 1),
    )


@triton.jit
def grad_key_value(
    call,
    given,
    grad_key,
    grad_value,
    grad_columns,
    grad_bias_k,
    grad_bias_v,
    TILE: tl.constexpr,
    AVERAGED: tl.constexpr,
):
    """The gradients of a block of keys (N, S, H_kv, D) and values, of their columns of scores (N, H, S), of the biases.

    All heads of queries that share the keys are summed here. A bias' gradient is of each batch element, (N, H_kv, D).
    """
    blocks = tl.cdiv(call.columns, TILE.BLOCK_N)
    key_heads = call.H // call.group
    sequence = tl.program_id(0) // blocks
    n, kv = sequence // key_heads, sequence % key_heads
    first_column = tl.program_id(0) % blocks * TILE.BLOCK_N
    columns = first_column + tl.arange(0, TILE.BLOCK_N)
    head = head_of(call, n, kv * call.group)
    key = load_keys(call, head, columns, TILE, True)
    value = load_values(call, head, columns, TILE, True)
    grad_k = zeros(TILE.BLOCK_N, TILE.BLOCK_D)
    grad_v = zeros(TILE.BLOCK_N, TILE.BLOCK_DV)
    tiles = visible_rows(call, head, first_column, TILE)
    for h in range(kv * call.group, (kv + 1) * call.group):
        head = head_of(call, n, h)
        sums = Sums(key=grad_k, value=grad_v, columns=full(0.0, TILE.BLOCK_N))
        for chunk in range(tiles.whole_begin, tiles.whole_end, chunk_size(call, TILE.BLOCK_M)):
            bits, count = visible_in_chunk(call, head, first_column, chunk, tiles.whole_end, TILE, False)
            for i in range(count):
                first_row = chunk + next_tile(call, i, bits) * TILE.BLOCK_M
                sums = _add_grad_key(
                    call, given, head, key, value, first_row, first_column, sums, TILE, False, AVERAGED
                )
                bits &= bits - 1
        for i in range((tiles.whole_begin - tiles.begin + tiles.end - tiles.whole_end) // TILE.BLOCK_M):
            first_row = tiles.begin + i * TILE.BLOCK_M
            if first_row >= tiles.whole_begin:
                first_row += tiles.whole_end - tiles.whole_begin
            sums = _add_grad_key(call, given, head, key, value, first_row, first_column, sums, TILE, True, AVERAGED)
        grad_k = sums.key
        grad_v = sums.value
        if grad_columns is not None:
            at = (head.n * call.H + head.h) * call.S + columns
            tl.store(grad_columns + at, sums.columns, mask=columns < call.S)
    grad_k *= call.scale
    key_row = n.to(tl.int64) * call.S * key_heads + kv
    store_rows(grad_key + key_row * TILE.D, key_heads * TILE.D, columns, columns < call.S, grad_k, TILE.D, TILE.BLOCK_D)
    store_rows(
        grad_value + key_row * TILE.D_V,
        key_heads * TILE.D_V,
        columns,
        columns < call.S,
        grad_v,
        TILE.D_V,
        TILE.BLOCK_DV,
    )
    if call.bias_k is not None:
        of_bias = n.to(tl.int64) * key_heads + kv
        is_bias = columns == call.S
        store_rows(grad_bias_k + of_bias * TILE.D, 0, columns, is_bias, grad_k, TILE.D, TILE.BLOCK_D)
        store_rows(grad_bias_v + of_bias * TILE.D_V, 0, columns, is_bias, grad_v, TILE.D_V, TILE.BLOCK_DV)


@triton.jit
def grad_mask(call, given, result, mask_batches, mask_heads, TILE: tl.constexpr, AVERAGED: tl.constexpr):
    """One tile of an attn_mask's gradient, (N|1, H|1, L, S), summed over the batch or the heads that share it."""
    matrix, first_row, first_column = tile_of_matrices(call, call.S, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    columns = first_column + tl.arange(0, TILE.BLOCK_N)
    batches, heads = call.N // mask_batches, call.H // mask_heads  # that share one
    of_mask = head_of(call, matrix // mask_heads, matrix % mask_heads)
    sequences = tl.where(tile_is_visible(call, of_mask, first_row, first_column, TILE), batches * heads, 0)
    total = zeros(TILE.BLOCK_M, TILE.BLOCK_N)
    for i in range(sequences):
        head = head_of(call, matrix // mask_heads + i // heads, matrix % mask_heads + i % heads)
        query = load_rows(head.query, call.query_l, rows, rows < call.L, TILE.D, TILE.BLOCK_D)
        grad_output = _merged_rows(given.grad_output, call, head, rows, rows < call.L, TILE.D_V, TILE.BLOCK_DV)
        key = load_keys(call, head, columns, TILE, True)
        value = load_values(call, head, columns, TILE, True)
        _, grad = _grad_scores(
            call, given, head, query, key, value, grad_output, rows, first_column, TILE, True, AVERAGED, False
        )
        total += grad
    at = result + (matrix.to(tl.int64) * call.L + rows.to(tl.int64))[:, None] * call.S + columns[None, :]
    tl.store(at, total, mask=(rows < call.L)[:, None] & (columns < call.S)[None, :])

"""The gradients of attention (Dao, arXiv 2307.08691, algorithm 2): keys and values by one kernel, queries by another.

`launch` calls these. Every sum is of one program in a fixed order: no atomics, and equal bits in every run.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_mha.backends.triton.gradient_tile import (
    Queries,
    load_queries,
    merged_rows,
    place_of_weights,
    terms_of,
    weights_and_gradients,
)
from fused_mha.backends.triton.scores import (
    as_score,
    distances,
    grad_of_products,
    load_sink,
    load_stats,
    softmax,
)
from fused_mha.backends.triton.tiles import (
    EDGE,
    block_of_queries,
    full,
    head_of,
    load_keys,
    load_of_rows,
    load_rows,
    load_values,
    program_of,
    rows_of_output,
    store_rows,
    tile_of_matrices,
    zeros,
)
from fused_mha.backends.triton.visibility import (
    chunk_size,
    edge,
    edge_count,
    look_up,
    next_tile,
    tile_is_visible,
    visible_keys,
    visible_rows,
)


@triton.jit
def _add_to_delta(
    call,
    given,
    head,
    queries,
    start,
    total,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
):
    columns = start + tl.arange(0, TILE.BLOCK_N)
    key = load_keys(call, head, columns, TILE, KIND)
    value = None if BY_OUTPUT else load_values(call, head, columns, TILE, KIND)
    weights, _, grad, _ = weights_and_gradients(call, given, head, queries, key, value, start, TILE, KIND, False)
    return total + tl.sum(weights * grad, 1)


@triton.jit
def _add_grad_query(
    call,
    given,
    head,
    queries,
    delta,
    start,
    total,
    of_slope,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
    SLOPES: tl.constexpr,
):
    columns = start + tl.arange(0, TILE.BLOCK_N)
    key = load_keys(call, head, columns, TILE, KIND)
    value = load_values(call, head, columns, TILE, KIND)
    weights, _, grad, scores = weights_and_gradients(call, given, head, queries, key, value, start, TILE, KIND, False)
    grad = weights * (grad - delta[:, None])
    if SLOPES:
        of_slope += tl.sum(grad * distances(call, queries.rows[:, None], columns[None, :], TILE, KIND), 1)
    grad = grad_of_products(call, grad, scores)
    return tl.dot(grad.to(key.dtype), key, total, input_precision=TILE.PRECISION), of_slope


@triton.jit
def _grad_sink(call, given, head, rows, shift, factor, delta, TILE: tl.constexpr):
    """What each row adds to the gradient of the sink, which is the log-sum-exp where a row sees nothing else."""
    of_hidden = 0.0 if given.grad_lse is None else load_of_rows(given.grad_lse, call, head, rows)
    probabilities = softmax(as_score(load_sink(call, head), call, TILE), shift, factor, call, TILE)
    return tl.where(factor == 0.0, of_hidden, -probabilities * delta)


@triton.jit
def _store_of_block(result, call, head, first_row, rows, values, TILE: tl.constexpr):
    """The sum of a block's rows, in (N, H, blocks), or in (1, H, slots) of packed sequences."""
    if call.place is not None:
        at = result + head.h * call.place.slots + call.place.slot
    else:
        blocks = tl.cdiv(call.L, TILE.BLOCK_M)
        at = result + (head.n * call.H + head.h) * blocks + first_row // TILE.BLOCK_M
    tl.store(at, tl.sum(tl.where(rows < call.L, values, 0.0), 0))


@triton.jit
def grad_query(call, given, result, grad_sinks, grad_slopes, TILE: tl.constexpr):
    """The gradients of a block of queries, (N, L, H, D), and of `Given` what the kernels below read.

    What the block adds to the gradient of the head's sink, and takes off that of its slope, is in (N, H, blocks), or in
    (1, H, slots) of packed sequences.

    A delta is what is subtracted from dW, the gradients of the weights W: rowsum(W * dW) less the gradient of the
    log-sum-exp. dW is dO V^T and what comes through the weights. Of half types, the first part is taken as
    rowsum(dO * O), which reads no key, but differs from the sum that it stands for by the rounding of O. So it is
    beside a gradient of the log-sum-exp, since rows that were merged by it have keys in other calls.
    """
    IS_HALF: tl.constexpr = call.query.dtype.element_ty != tl.float32
    BY_OUTPUT: tl.constexpr = tl.constexpr(IS_HALF or given.grad_lse is not None)
    head, first_row = block_of_queries(call, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    grad_output = merged_rows(given.grad_output, call, head, rows, rows < call.L, TILE)
    shift, factor = load_stats(given.stats, call, head, rows, TILE)
    if given.cleaned is not None:
        grad_output = tl.where((factor == 0.0)[:, None], 0.0, grad_output)
        at = rows_of_output(given.cleaned, call, head, TILE)
        store_rows(at, call.output_l, rows, rows < call.L, grad_output, TILE.D_V, TILE.BLOCK_DV)
    query = load_rows(head.query, call.query_l, rows, rows < call.L, TILE.D, TILE.BLOCK_D)
    queries = Queries(rows=rows, query=query, grad_output=grad_output, shift=shift, factor=factor)
    tiles = visible_keys(call, first_row, TILE)
    BITS: tl.constexpr = call.squares is not None or call.padding is not None  # one by one, tiles may be hidden
    delta = full(0.0, TILE.BLOCK_M)
    if BY_OUTPUT:
        output = merged_rows(given.output, call, head, rows, rows < call.L, TILE)
        delta += tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)
    if not BY_OUTPUT or given.grad_weights is not None:
        OF_NAMED: tl.constexpr = BY_OUTPUT and given.named is not None
        whole_end = tiles.whole_end
        if OF_NAMED:
            whole_end = tl.where(place_of_weights(given, head) >= 0, whole_end, tiles.whole_begin)
        for chunk in range(tiles.whole_begin, whole_end, chunk_size(TILE.BLOCK_N, BITS)):
            found = look_up(call, head, first_row, chunk, whole_end, TILE, True, BITS)
            for KIND in tl.static_range(2):  # PLAIN, MASKED
                bits, count = found[KIND]
                for i in range(count):
                    start = chunk + next_tile(i, bits, BITS) * TILE.BLOCK_N
                    delta = _add_to_delta(call, given, head, queries, start, delta, TILE, KIND, BY_OUTPUT)
                    bits &= bits - 1
        edges = edge_count(tiles, call, TILE)
        if OF_NAMED:
            edges = tl.where(place_of_weights(given, head) >= 0, edges, 0)
        for i in range(edges):
            start = edge(i, tiles, call, TILE)
            delta = _add_to_delta(call, given, head, queries, start, delta, TILE, EDGE, BY_OUTPUT)
    if given.grad_lse is not None:
        delta -= tl.where(factor == 0.0, 0.0, load_of_rows(given.grad_lse, call, head, rows))
    at, length = terms_of(call, given, head, rows)
    tl.store(at, shift, mask=rows < call.L)
    tl.store(at + length, factor, mask=rows < call.L)
    tl.store(at + 2 * length, delta, mask=rows < call.L)
    if grad_sinks is not None:
        of_sink = _grad_sink(call, given, head, rows, shift, factor, delta, TILE)
        _store_of_block(grad_sinks, call, head, first_row, rows, of_sink, TILE)
    SLOPES: tl.constexpr = grad_slopes is not None
    of_slope = full(0.0, TILE.BLOCK_M)
    total = zeros(TILE.BLOCK_M, TILE.BLOCK_D)
    for chunk in range(tiles.whole_begin, tiles.whole_end, chunk_size(TILE.BLOCK_N, BITS)):
        found = look_up(call, head, first_row, chunk, tiles.whole_end, TILE, True, BITS)
        for KIND in tl.static_range(2):  # PLAIN, MASKED
            bits, count = found[KIND]
            for i in range(count):
                start = chunk + next_tile(i, bits, BITS) * TILE.BLOCK_N
                total, of_slope = _add_grad_query(
                    call, given, head, queries, delta, start, total, of_slope, TILE, KIND, SLOPES
                )
                bits &= bits - 1
    for i in range(edge_count(tiles, call, TILE)):
        start = edge(i, tiles, call, TILE)
        total, of_slope = _add_grad_query(call, given, head, queries, delta, start, total, of_slope, TILE, EDGE, SLOPES)
    if SLOPES:
        _store_of_block(grad_slopes, call, head, first_row, rows, of_slope, TILE)
    at = result + head.n * call.grad_query_n + head.h * TILE.D
    places = rows if call.place is None else rows + call.place.first_query  # among those of all sequences
    store_rows(at, call.grad_query_l, places, rows < call.L, total * call.scale, TILE.D, TILE.BLOCK_D)


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
    KIND: tl.constexpr,
):
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    is_read = rows < call.L if KIND == EDGE else None
    queries, delta = load_queries(call, given, head, rows, is_read, TILE)
    probabilities, weights, grad, scores = weights_and_gradients(
        call, given, head, queries, key, value, first_column, TILE, KIND, True
    )
    grad = probabilities * (grad - delta[None, :])
    of_products = grad_of_products(call, grad, scores).to(key.dtype)
    return Sums(
        key=tl.dot(of_products, queries.query, sums.key, input_precision=TILE.PRECISION),
        value=tl.dot(weights.to(value.dtype), queries.grad_output, sums.value, input_precision=TILE.PRECISION),
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
):
    """The gradients of a block of keys (N, S, H_kv, D) and values, of their columns of scores (N, H, S), of the biases.

    All heads of queries that share the keys are summed here. A bias' gradient is of each batch element, (N, H_kv, D),
    or of each packed sequence and of what is behind them, (N + 1, H_kv, D).
    """
    blocks = tl.cdiv(call.columns, TILE.BLOCK_N)
    key_heads = call.H // call.group
    n, kv, block = program_of(call, blocks, key_heads)
    first_column = block * TILE.BLOCK_N
    columns = first_column + tl.arange(0, TILE.BLOCK_N)
    places = columns if call.place is None else columns + call.place.first_key  # among those of all sequences
    head = head_of(call, n, kv * call.group)
    key = load_keys(call, head, columns, TILE, EDGE)
    value = load_values(call, head, columns, TILE, EDGE)
    grad_k = zeros(TILE.BLOCK_N, TILE.BLOCK_D)
    grad_v = zeros(TILE.BLOCK_N, TILE.BLOCK_DV)
    tiles = visible_rows(call, head, first_column, TILE)
    BITS: tl.constexpr = call.squares is not None  # the padding is that of all tiles
    for h in range(kv * call.group, (kv + 1) * call.group):
        head = head_of(call, n, h)
        sums = Sums(key=grad_k, value=grad_v, columns=full(0.0, TILE.BLOCK_N))
        for chunk in range(tiles.whole_begin, tiles.whole_end, chunk_size(TILE.BLOCK_M, BITS)):
            found = look_up(call, head, first_column, chunk, tiles.whole_end, TILE, False, BITS)
            for KIND in tl.static_range(2):  # PLAIN, MASKED
                bits, count = found[KIND]
                for i in range(count):
                    first_row = chunk + next_tile(i, bits, BITS) * TILE.BLOCK_M
                    sums = _add_grad_key(call, given, head, key, value, first_row, first_column, sums, TILE, KIND)
                    bits &= bits - 1
        for i in range((tiles.whole_begin - tiles.begin + tiles.end - tiles.whole_end) // TILE.BLOCK_M):
            first_row = tiles.begin + i * TILE.BLOCK_M
            if first_row >= tiles.whole_begin:
                first_row += tiles.whole_end - tiles.whole_begin
            sums = _add_grad_key(call, given, head, key, value, first_row, first_column, sums, TILE, EDGE)
        grad_k = sums.key
        grad_v = sums.value
        if grad_columns is not None:
            if call.place is not None:
                at = head.h * call.place.all_keys + places
            else:
                at = (head.n * call.H + head.h) * call.S + places
            tl.store(grad_columns + at, sums.columns, mask=columns < call.S)
    grad_k *= call.scale
    if call.seed is not None:
        grad_v *= call.kept_factor
    is_key = columns < call.S
    at = grad_key + n.to(tl.int64) * call.grad_key_n + kv * TILE.D
    store_rows(at, call.grad_key_l, places, is_key, grad_k, TILE.D, TILE.BLOCK_D)
    at = grad_value + n.to(tl.int64) * call.grad_value_n + kv * TILE.D_V
    store_rows(at, call.grad_value_l, places, is_key, grad_v, TILE.D_V, TILE.BLOCK_DV)
    if call.bias_k is not None:
        of_bias = n.to(tl.int64) * key_heads + kv
        is_bias = columns == call.S
        store_rows(grad_bias_k + of_bias * TILE.D, 0, columns, is_bias, grad_k, TILE.D, TILE.BLOCK_D)
        store_rows(grad_bias_v + of_bias * TILE.D_V, 0, columns, is_bias, grad_v, TILE.D_V, TILE.BLOCK_DV)


@triton.jit
def grad_mask(call, given, result, TILE: tl.constexpr):
    """One tile of an attn_mask's gradient, (N|1, H|1, L, S), summed over the batch or the heads that share it."""
    matrix, first_row, first_column = tile_of_matrices(call, call.S, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    columns = first_column + tl.arange(0, TILE.BLOCK_N)
    batches, heads = call.N // call.mask_batches, call.H // call.mask_heads  # that share one
    of_mask = head_of(call, matrix // call.mask_heads, matrix % call.mask_heads)
    is_visible = tile_is_visible(call, of_mask, first_row, first_column, batches > 1, False, TILE)
    sequences = tl.where(is_visible, batches * heads, 0)
    total = zeros(TILE.BLOCK_M, TILE.BLOCK_N)
    for i in range(sequences):
        head = head_of(call, matrix // call.mask_heads + i // heads, matrix % call.mask_heads + i % heads)
        queries, delta = load_queries(call, given, head, rows, rows < call.L, TILE)
        key = load_keys(call, head, columns, TILE, EDGE)
        value = load_values(call, head, columns, TILE, EDGE)
        weights, _, grad, _ = weights_and_gradients(
            call, given, head, queries, key, value, first_column, TILE, EDGE, False
        )
        total += weights * (grad - delta[:, None])
    at = result + (matrix.to(tl.int64) * call.L + rows.to(tl.int64))[:, None] * call.S + columns[None, :]
    tl.store(at, total, mask=(rows < call.L)[:, None] & (columns < call.S)[None, :])

"""Forward attention by an online softmax over tiles of keys (Dao, arXiv 2307.08691, algorithm 1); `launch` calls it.

A program attends from BLOCK_M queries of one head. Tiles of keys that causality, the window or the masks hide from all
of them are not visited; at the edges of the band it looks at no mask for that.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fused_mha.backends.triton.scores import (
    as_score,
    exponentials,
    load_sink,
    masked_scores,
    scores_of,
    shift_of,
)
from fused_mha.backends.triton.tiles import (
    EDGE,
    NEGATIVE_INFINITY,
    all_rows,
    block_of_queries,
    first_of_rows,
    full,
    is_kept,
    load_keys,
    load_rows,
    load_values,
    rows_of_output,
    store_rows,
    zeros,
)
from fused_mha.backends.triton.visibility import (
    chunk_size,
    edge,
    edge_count,
    look_up,
    next_tile,
    visible_keys,
)


@triton.jit
def _attend(call, head, query, rows, start, output, row_max, row_sum, TILE: tl.constexpr, KIND: tl.constexpr):
    """Takes a tile of keys into the running maximum and sum, and the output that is not yet divided by the sum."""
    columns = start + tl.arange(0, TILE.BLOCK_N)
    key = load_keys(call, head, columns, TILE, KIND)
    products = tl.dot(query, tl.trans(key), input_precision=TILE.PRECISION)
    scores = scores_of(call, products, TILE)
    scores = masked_scores(call, head, scores, rows[:, None], columns[None, :], TILE, KIND)
    later_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = shift_of(later_max)
    weights = exponentials(scores, shift[:, None], call, TILE)
    rescaling = exponentials(row_max, shift, call, TILE)
    row_sum = row_sum * rescaling + tl.sum(weights, 1)
    value = load_values(call, head, columns, TILE, KIND)
    weights = weights.to(value.dtype)
    if call.seed is not None:  # a factor of half types is the cheaper one here, where it changes its layout
        weights *= tl.where(is_kept(call, head, rows, start, TILE), 1.0, 0.0).to(value.dtype)
    output = tl.dot(weights, value, output * rescaling[:, None], input_precision=TILE.PRECISION)
    return output, later_max, row_sum


@triton.jit
def forward(call, output, lse, stats, TILE: tl.constexpr):
    """The output (N, L, H, D_v) of a block of queries, their log-sum-exp (N, H, L), maxima and sums (2, N, H, L).

    The head's sink comes last, and not in maxima and sums of rows that see nothing, which the backward knows by these.
    """
    head, first_row = block_of_queries(call, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    query = load_rows(head.query, call.query_l, rows, rows < call.L, TILE.D, TILE.BLOCK_D)
    summed = zeros(TILE.BLOCK_M, TILE.BLOCK_DV)
    row_max = full(NEGATIVE_INFINITY, TILE.BLOCK_M)
    row_sum = full(0.0, TILE.BLOCK_M)
    tiles = visible_keys(call, first_row, TILE)
    BITS: tl.constexpr = call.squares is not None or call.padding is not None  # one by one, tiles may be hidden
    for chunk in range(tiles.whole_begin, tiles.whole_end, chunk_size(TILE.BLOCK_N, BITS)):
        found = look_up(call, head, first_row, chunk, tiles.whole_end, TILE, True, BITS)
        for KIND in tl.static_range(2):  # PLAIN, MASKED
            bits, count = found[KIND]
            for i in range(count):
                start = chunk + next_tile(i, bits, BITS) * TILE.BLOCK_N
                summed, row_max, row_sum = _attend(call, head, query, rows, start, summed, row_max, row_sum, TILE, KIND)
                bits &= bits - 1
    for i in range(edge_count(tiles, call, TILE)):
        start = edge(i, tiles, call, TILE)
        summed, row_max, row_sum = _attend(call, head, query, rows, start, summed, row_max, row_sum, TILE, EDGE)
    is_hidden = row_sum == 0.0  # everywhere
    lse_of_hidden = NEGATIVE_INFINITY
    if call.sinks is not None:
        lse_of_hidden = load_sink(call, head)
        sink = as_score(lse_of_hidden, call, TILE)
        later_max = tl.where(is_hidden, NEGATIVE_INFINITY, tl.maximum(row_max, sink))
        shift = shift_of(later_max)
        rescaling = exponentials(row_max, shift, call, TILE)
        row_sum = tl.where(is_hidden, 0.0, row_sum * rescaling + exponentials(sink, shift, call, TILE))
        row_max = later_max
        summed *= rescaling[:, None]
    factor = tl.where(is_hidden, 0.0, call.kept_factor / row_sum)
    summed = tl.where(is_hidden[:, None], 0.0, summed * factor[:, None])
    at_output = rows_of_output(output, call, head, TILE)
    store_rows(at_output, call.output_l, rows, rows < call.L, summed, TILE.D_V, TILE.BLOCK_DV)
    at = first_of_rows(call, head) + rows
    tl.store(stats + at, row_max, mask=rows < call.L)
    tl.store(stats + all_rows(call) + at, row_sum, mask=rows < call.L)
    natural_max = row_max if TILE.NATURAL else row_max * call.scale
    tl.store(lse + at, tl.where(is_hidden, lse_of_hidden, natural_max + tl.log(row_sum)), mask=rows < call.L)

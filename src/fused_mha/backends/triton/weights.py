"""The attention weights from what the forward found of each row: no (N, H, L, S) tensor for their mean.

`launch` calls this.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from fused_mha.backends.triton.scores import load_stats, scores_of, softmax_tile
from fused_mha.backends.triton.tiles import (
    EDGE,
    head_of,
    is_kept,
    load_keys,
    load_rows,
    multiple,
    tile_of_matrices,
    zeros,
)
from fused_mha.backends.triton.visibility import tile_is_visible


@triton.jit
def weights(call, stats, result, named, TILE: tl.constexpr):
    """One tile of the weights after dropout: (N, L, S') as means over the heads if AVERAGED, else (N, H, L, S') or of
    the n heads that are named, (N, n, L, S').
    """
    matrix, first_row, first_column = tile_of_matrices(call, call.columns, TILE)
    rows = first_row + tl.arange(0, TILE.BLOCK_M)
    columns = first_column + tl.arange(0, TILE.BLOCK_N)
    total = zeros(TILE.BLOCK_M, TILE.BLOCK_N)
    if TILE.AVERAGED:
        n, first_head, heads = matrix, 0, call.H
    elif named is not None:
        count = tl.load(named)
        n, first_head, heads = matrix // count, tl.load(named + 1 + call.H + matrix % count), 1
    else:
        n, first_head, heads = matrix // call.H, matrix % call.H, 1
    differ = (call.squares_h != 0) & (heads > 1)
    is_visible = tile_is_visible(call, head_of(call, n, first_head), first_row, first_column, False, differ, TILE)
    heads = tl.where(is_visible, heads, 0)
    for h in range(first_head, first_head + heads):
        head = head_of(call, n, h)
        query = load_rows(head.query, call.query_l, rows, rows < call.L, TILE.D, TILE.BLOCK_D)
        key = load_keys(call, head, columns, TILE, EDGE)
        products = tl.dot(query, tl.trans(key), input_precision=TILE.PRECISION)
        shift, factor = load_stats(stats, call, head, rows, TILE)
        scores = scores_of(call, products, TILE)
        of_head = softmax_tile(
            call, head, shift[:, None], factor[:, None], scores, rows[:, None], columns[None, :], TILE, EDGE
        )
        if call.seed is not None:
            of_head = tl.where(is_kept(call, head, rows, first_column, TILE), of_head, 0.0)
        total += of_head
    factor = call.kept_factor / call.H if TILE.AVERAGED else call.kept_factor
    row_stride = multiple(call.columns, TILE.WEIGHTS_UNIT)
    at = result + (matrix.to(tl.int64) * call.L + rows.to(tl.int64))[:, None] * row_stride + columns[None, :]
    is_written = (rows < call.L)[:, None] & (columns < call.columns)[None, :]
    tl.store(at, (total * factor).to(result.dtype.element_ty), mask=is_written)

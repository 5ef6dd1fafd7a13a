"""Which tiles a program visits: those that causality, the window, the padding and the attn_mask leave visible.

`launch` runs `mask_squares` before the others, where many heads share a mask; these ask here where to go. What a
mask does not touch, by hiding a key or adding to a score, it is not read for.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_mha.backends.triton.tiles import hides

SQUARE = tl.constexpr(16)  # side of what an attn_mask is looked at by; it divides every block
VISIBLE, TOUCHED = tl.constexpr(1), tl.constexpr(2)  # flags: a key is not hidden; one is hidden, or its score added to
CHUNK = tl.constexpr(64)  # tiles that are looked up at once, a bit for each


class Range(NamedTuple):
    """Tiles of keys or queries: those before `whole_begin` or from `whole_end` on are at an edge of the band."""

    begin: Any
    whole_begin: Any
    whole_end: Any
    end: Any


@triton.jit
def aligned_range(begin, end, whole_begin, whole_end, limit, BLOCK: tl.constexpr):
    """Tiles of the positions begin..end below a limit, of which whole_begin..whole_end need no look at the band."""
    end = tl.maximum(tl.minimum(end, limit), 0)
    begin = tl.minimum(tl.maximum(begin, 0), end) // BLOCK * BLOCK
    whole_begin = tl.cdiv(tl.maximum(whole_begin, 0), BLOCK) * BLOCK
    whole_end = tl.maximum(tl.minimum(whole_end, limit), 0) // BLOCK * BLOCK
    end = tl.cdiv(end, BLOCK) * BLOCK
    whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
    whole_end = tl.minimum(tl.maximum(whole_end, whole_begin), end)
    return Range(begin=begin, whole_begin=whole_begin, whole_end=whole_end, end=end)


@triton.jit
def visible_keys(call, first_row, TILE: tl.constexpr):
    """The real keys that causality and the window let some of a block's queries see."""
    last_row = first_row + TILE.BLOCK_M - 1
    begin = first_row + call.first_visible
    end = last_row + call.last_visible + 1
    return aligned_range(
        begin, end, last_row + call.first_visible, first_row + call.last_visible + 1, call.S, TILE.BLOCK_N
    )


@triton.jit
def visible_rows(call, head, first_column, TILE: tl.constexpr):
    """The queries that causality and the window let see some of a block's keys, unless the padding hides these."""
    last_column = first_column + TILE.BLOCK_N - 1
    begin = first_column - call.last_visible
    end = last_column - call.first_visible + 1
    whole_begin = last_column - call.last_visible
    whole_end = first_column - call.first_visible + 1
    if call.padding is not None:
        end = tl.where(_padding_flags(call, head, first_column, TILE) & VISIBLE != 0, end, 0)
    reaches_end = last_column >= call.S
    whole_end = tl.where(reaches_end, 0, whole_end)
    if TILE.VIRTUAL:  # all of them see virtual keys
        begin = tl.where(reaches_end, 0, begin)
        end = tl.where(reaches_end, call.L, end)
    return aligned_range(begin, end, whole_begin, whole_end, call.L, TILE.BLOCK_M)


@triton.jit
def edge_count(tiles, call, TILE: tl.constexpr):
    """How many tiles of a range of keys need a look at the band or the end of the keys, the virtual ones included."""
    count = (tiles.whole_begin - tiles.begin + tiles.end - tiles.whole_end) // TILE.BLOCK_N
    if TILE.VIRTUAL:
        virtual = call.columns - _first_virtual(tiles, call, TILE)
        count += tl.cdiv(tl.maximum(virtual, 0), TILE.BLOCK_N)
    return count


@triton.jit
def edge(i, tiles, call, TILE: tl.constexpr):
    """The first column of tile `i` of these."""
    start = tiles.begin + i * TILE.BLOCK_N
    if start >= tiles.whole_begin:
        start += tiles.whole_end - tiles.whole_begin
    if TILE.VIRTUAL and start >= tiles.end:
        start += _first_virtual(tiles, call, TILE) - tiles.end
    return start


@triton.jit
def _first_virtual(tiles, call, TILE: tl.constexpr):
    """Where the tiles of virtual keys begin that share none with the real keys of the range."""
    return tl.maximum(tiles.end, call.S // TILE.BLOCK_N * TILE.BLOCK_N)


@triton.jit
def tile_is_visible(call, head, first_row, first_column, without_padding, without_squares, TILE: tl.constexpr):
    """Whether causality, the window and a head's masks, but for one that is left out, let a query of a tile see a key.

    A program that sums over heads leaves out the masks that are not the same for all of them.
    """
    last_column = first_column + TILE.BLOCK_N - 1
    nearest = first_column - (first_row + TILE.BLOCK_M - 1)
    furthest = last_column - first_row
    is_visible = (nearest <= call.last_visible) & (furthest >= call.first_visible)
    if call.padding is not None:
        flags = _padding_flags(call, head, first_column, TILE)
        is_visible = is_visible & (without_padding | (flags & VISIBLE != 0))
    if call.squares is not None:
        flags = _any(_any(_load_squares(call, head, first_row, first_column, TILE.BLOCK_M, TILE.BLOCK_N), 1), 0)
        is_visible = is_visible & (without_squares | (flags & VISIBLE != 0))
    return is_visible | (last_column >= call.S) if TILE.VIRTUAL else is_visible


@triton.jit
def mask_squares(call, result, TILE: tl.constexpr):
    """The flags of an attn_mask's squares, uint8 (N|1, H|1, ceil(L / SQUARE), ceil(S / SQUARE))."""
    row_squares = tl.cdiv(call.L, SQUARE)
    BLOCK: tl.constexpr = TILE.BLOCK_N
    blocks = tl.cdiv(call.S, BLOCK)
    row_square = tl.program_id(0) // blocks  # of all matrices
    matrix = (row_square // row_squares).to(tl.int64)
    rows = row_square % row_squares * SQUARE + tl.arange(0, SQUARE)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = call.attn_mask + matrix // call.mask_heads * call.mask_n + matrix % call.mask_heads * call.mask_h
    at = at + rows.to(tl.int64)[:, None] * call.mask_l + columns[None, :]
    is_read = (rows < call.L)[:, None] & (columns < call.S)[None, :]
    of_columns = _any(_flags(tl.load(at, mask=is_read, other=0), is_read), 0)
    of_squares = _any(tl.reshape(of_columns, (BLOCK // SQUARE, SQUARE)), 1)
    column_squares = tl.cdiv(call.S, SQUARE)
    squares = tl.program_id(0) % blocks * (BLOCK // SQUARE) + tl.arange(0, BLOCK // SQUARE)
    at = result + row_square.to(tl.int64) * column_squares + squares
    tl.store(at, of_squares.to(tl.uint8), mask=squares < column_squares)


@triton.jit
def chunk_size(BLOCK: tl.constexpr, BITS: tl.constexpr):
    """How many keys or queries are looked up at once; all, where each tile needs no bit."""
    return CHUNK * BLOCK if BITS else 1 << 30


@triton.jit
def look_up(call, head, first, start, end, TILE: tl.constexpr, OF_KEYS: tl.constexpr, BITS: tl.constexpr):
    """The tiles of a chunk from `start` on, before `end`: those that no mask touches, and the other visible ones.

    The chunk is of keys, for a block of queries from `first` on, if OF_KEYS, else of queries for a block of keys. Each
    of the two is a bit for each tile, if BITS, and the number of the tiles.
    """
    BLOCK: tl.constexpr = TILE.BLOCK_N if OF_KEYS else TILE.BLOCK_M
    all_touched = 1 if call.attn_mask is not None and call.squares is None else 0
    if call.padding is not None and not OF_KEYS:
        all_touched = all_touched | (_padding_flags(call, head, first, TILE) // TOUCHED)
    if BITS:
        tiles = tl.arange(0, CHUNK)
        visible = (start + tiles * BLOCK < end).to(tl.int32)
        touched = tl.zeros((CHUNK,), tl.int32) + all_touched
        if call.padding is not None and OF_KEYS:
            flags = _load_padding(call, head, start + tl.arange(0, CHUNK * BLOCK))
            flags = _any(tl.reshape(flags, (CHUNK, BLOCK)), 1)
            visible, touched = visible & flags, touched | (flags // TOUCHED)
        if call.squares is not None:
            if OF_KEYS:
                flags = _any(_load_squares(call, head, first, start, TILE.BLOCK_M, CHUNK * BLOCK), 0)
            else:
                flags = _any(_load_squares(call, head, start, first, CHUNK * BLOCK, TILE.BLOCK_N), 1)
            flags = _any(tl.reshape(flags, (CHUNK, BLOCK // SQUARE)), 1)
            visible, touched = visible & flags, touched | (flags // TOUCHED)
        touched = visible & touched
        untouched = visible - touched
        untouched_count, touched_count = tl.sum(untouched, 0), tl.sum(touched, 0)
        untouched_bits = tl.sum(untouched.to(tl.int64) << tiles.to(tl.int64), 0)
        touched_bits = tl.sum(touched.to(tl.int64) << tiles.to(tl.int64), 0)
    else:
        touched_count = tl.cdiv(end - start, BLOCK) * all_touched
        untouched_count = tl.cdiv(end - start, BLOCK) - touched_count
        untouched_bits = tl.cast(0, tl.int64)
        touched_bits = untouched_bits
    return (untouched_bits, untouched_count), (touched_bits, touched_count)


@triton.jit
def next_tile(i, bits, BITS: tl.constexpr):
    """Which tile of a chunk is the i-th, the bits of those before it being off."""
    if BITS:
        power = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
        tile = ((power >> 23) & 0xFF) - 127  # its exponent
    else:
        tile = i
    return tile


@triton.jit
def _flags(mask, is_read):
    """The flags of the values of a mask, 0 where it is not read."""
    flags = tl.where(hides(mask), 0, VISIBLE) | tl.where(mask == 0, 0, TOUCHED)
    return tl.where(is_read, flags, 0)


@triton.jit
def _any(flags, DIM: tl.constexpr):
    """The flags that any has, along a dimension."""
    return tl.max(flags & VISIBLE, DIM) | tl.max(flags & TOUCHED, DIM)


@triton.jit
def _padding_flags(call, head, first_column, TILE: tl.constexpr):
    """The flags of the padding of a block of keys."""
    return _any(_load_padding(call, head, first_column + tl.arange(0, TILE.BLOCK_N)), 0)


@triton.jit
def _load_padding(call, head, columns):
    is_key = columns < call.S
    return _flags(tl.load(call.padding + head.padding + columns, mask=is_key, other=0), is_key)


@triton.jit
def _load_squares(call, head, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What `mask_squares` found of a part of a head's mask."""
    rows = first_row // SQUARE + tl.arange(0, ROWS // SQUARE)
    columns = first_column // SQUARE + tl.arange(0, COLUMNS // SQUARE)
    row_squares, column_squares = tl.cdiv(call.L, SQUARE), tl.cdiv(call.S, SQUARE)
    at = call.squares + head.n * call.squares_n + head.h * call.squares_h
    at = at + rows.to(tl.int64)[:, None] * column_squares + columns[None, :]
    is_read = (rows < row_squares)[:, None] & (columns < column_squares)[None, :]
    return tl.load(at, mask=is_read, other=0).to(tl.int32)

"""What the kernels share: the arguments of a call, tiles of tensors, and which weights dropout keeps.

`forward`, `weights` and `backward` call these; `scores` has the softmax, `visibility` says which tiles they visit. A
tile is BLOCK_M queries by BLOCK_N keys of one head. Columns S and behind are the virtual keys: the bias, if there is
one, and the zero key; `columns` counts them too.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
# Kinds of tiles: no mask touches it; one may; and it may be at an edge of the band or hold the end of the keys.
PLAIN, MASKED, EDGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PADDING_UNIT = tl.constexpr(16)  # elements, which divides the rows of the padding in memory
MOST_ROWS = tl.constexpr(128)  # BLOCK_M, which divides this


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    D: int
    D_V: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int  # a power of 2, from D on
    BLOCK_DV: int
    VIRTUAL: bool  # there are virtual keys
    NATURAL: bool  # scores are scaled before the softmax, since something is added, they are capped, or by no scale > 0
    EXACT: bool  # the softmax is right however large the scores are: in fp32, and for the scores that are NATURAL
    GROUPED: bool  # query heads share the heads of keys
    AVERAGED: bool  # the weights are means over the heads
    MASK_UNIT: int  # which divides the strides of attn_mask: the elements of 16 bytes, or 1
    WEIGHTS_UNIT: int  # which divides the rows of the weights, likewise
    PRECISION: str  # of fp32 products, as `tl.dot` names it
    PLACED: bool  # the seed says where the call stands in a longer one
    BY_KEYS: bool  # a program has a block of keys, not of queries


class Searched(NamedTuple):
    """What `mask_squares` is compiled for."""

    BLOCK_N: int
    GROUPED: bool
    MASK_UNIT: int


class Call(NamedTuple):
    """What every kernel is given of a call: tensors, then numbers. Strides are in elements, 0 where a mask broadcasts.

    Addresses, strides and head sizes of all but the masks are multiples of 16 bytes. Of packed sequences, those of
    batch elements are 0, and `launch` gives the numbers of all; `entry` makes those of one sequence of them.
    """

    query: Any  # (N, L, H, D), as all of them with contiguous last dimensions
    key: Any  # (N, S, H_kv, D)
    value: Any  # (N, S, H_kv, D_v)
    attn_mask: Any  # (N|1, H|1, L|1, S), uint8 for bool, or None
    padding: Any  # (N, S), uint8 for bool, or None
    squares: Any  # what `mask_squares` finds of attn_mask, or None
    bias_k: Any  # (H_kv, D) or None
    bias_v: Any  # (H_kv, D_v) or None
    seed: Any  # (2) or, PLACED, (6), int64, or None
    sinks: Any  # (H) or None
    alibi_slopes: Any  # (H) or None
    cu_seqlens_q: Any  # (N + 1), int64, of packed sequences, or None
    cu_seqlens_k: Any  # likewise
    query_n: Any
    query_l: Any
    query_h: Any
    key_n: Any
    key_l: Any
    key_h: Any
    value_n: Any
    value_l: Any
    value_h: Any
    output_n: Any  # of the output too and of its gradient, as those below with contiguous heads
    output_l: Any
    grad_query_n: Any
    grad_query_l: Any
    grad_key_n: Any
    grad_key_l: Any
    grad_value_n: Any
    grad_value_l: Any
    mask_n: Any
    mask_h: Any
    mask_l: Any
    together: Any  # batch elements, a divisor of N: programs of theirs that share a tile of the mask follow each other
    mask_batches: Any  # how many of them attn_mask is of, and how many heads
    mask_heads: Any
    squares_n: Any
    squares_h: Any
    padding_n: Any
    N: Any
    L: Any
    S: Any
    columns: Any  # S and the virtual keys
    H: Any
    group: Any  # query heads of a key head
    first_visible: Any
    last_visible: Any
    scale: Any
    threshold: Any  # of 16 random bits, from which on dropout keeps
    kept_factor: Any  # 1 / (1 - dropout_p), 0 where it keeps nothing
    diagonal: Any  # the position of query i less i, or None without slopes; for packed sequences `launch` gives 1 or 0
    softcap: Any  # or None
    place: Any  # of packed sequences, which `entry` finds, or None


TENSORS = Call._fields.index("query_n")  # how many of the fields


class Head(NamedTuple):
    """One head of one batch element: where its tensors begin, and the offsets of what may be absent.

    Triton 3.6 has no None in a tuple that a function returns.
    """

    query: Any
    key: Any
    value: Any
    mask: Any
    padding: Any
    kv: Any  # the head of keys and values
    n: Any
    h: Any


@triton.jit
def head_of(call, n, h):
    """Query head h of batch element n."""
    n = tl.cast(n, tl.int64)
    h = tl.cast(h, tl.int64)
    kv = h // call.group
    return Head(
        query=call.query + n * call.query_n + h * call.query_h,
        key=call.key + n * call.key_n + kv * call.key_h,
        value=call.value + n * call.value_n + kv * call.value_h,
        mask=n * call.mask_n + h * call.mask_h,
        padding=n * call.padding_n,
        kv=kv,
        n=n,
        h=h,
    )


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """x, which UNIT divides: the compiler sees it here, and then loads and stores 16 bytes at once."""
    return x // UNIT * UNIT


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """A matrix to sum into."""
    return tl.zeros((ROWS, COLUMNS), DTYPE)


@triton.jit
def full(value, ROWS: tl.constexpr):
    """A number for each row."""
    return tl.full((ROWS,), value, tl.float32)


@triton.jit
def load_rows(tensor, row_stride, rows, is_read, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D elements, (rows, BLOCK_D), zeros where ``is_read`` is False; all are read where it is None."""
    elements = tl.arange(0, BLOCK_D)
    at = tensor + rows.to(tl.int64)[:, None] * row_stride + elements[None, :]
    if is_read is None:
        values = tl.load(at) if BLOCK_D == D else tl.load(at, mask=(elements < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        values = tl.load(at, mask=is_read[:, None], other=0.0)
    else:
        values = tl.load(at, mask=is_read[:, None] & (elements < D)[None, :], other=0.0)
    return values


@triton.jit
def rows_of_output(tensor, call, head, TILE: tl.constexpr):
    """Where a head of the output begins, or of what lies as the output does."""
    at = tensor + head.n * call.output_n + head.h * TILE.D_V
    return at if call.place is None else at + call.place.first_query.to(tl.int64) * call.output_l


@triton.jit
def store_rows(tensor, row_stride, rows, is_written, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`."""
    elements = tl.arange(0, BLOCK_D)
    at = tensor + rows.to(tl.int64)[:, None] * row_stride + elements[None, :]
    tl.store(at, values.to(tensor.dtype.element_ty), mask=is_written[:, None] & (elements < D)[None, :])


@triton.jit
def hides(mask):
    """Where the values of a mask hide a key: True of a boolean one, -inf of another."""
    return mask != 0 if mask.dtype == tl.uint8 else mask.to(tl.float32) == NEGATIVE_INFINITY


@triton.jit
def _load_keys(
    tensor, row_stride, bias, call, head, columns, D: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr
):
    if call.padding is not None and KIND != PLAIN:  # what it hides is never read
        at = call.padding + head.padding + columns
        is_read = hides(tl.load(at, mask=columns < call.S, other=0) if KIND == EDGE else tl.load(at)) == 0
        if KIND == EDGE:
            is_read = is_read & (columns < call.S)
        rows = load_rows(tensor, row_stride, columns, is_read, D, BLOCK_D)
    elif KIND == EDGE:
        rows = load_rows(tensor, row_stride, columns, columns < call.S, D, BLOCK_D)
    else:
        rows = load_rows(tensor, row_stride, columns, None, D, BLOCK_D)
    if KIND == EDGE and bias is not None:
        elements = tl.arange(0, BLOCK_D)
        of_bias = tl.load(bias + head.kv * D + elements, mask=elements < D, other=0.0)
        rows = tl.where((columns == call.S)[:, None], of_bias[None, :], rows)
    return rows


@triton.jit
def load_keys(call, head, columns, TILE: tl.constexpr, KIND: tl.constexpr):
    """Keys (columns, BLOCK_D); the virtual ones of an EDGE alone."""
    return _load_keys(head.key, call.key_l, call.bias_k, call, head, columns, TILE.D, TILE.BLOCK_D, KIND)


@triton.jit
def load_values(call, head, columns, TILE: tl.constexpr, KIND: tl.constexpr):
    """Values (columns, BLOCK_DV), likewise."""
    return _load_keys(head.value, call.value_l, call.bias_v, call, head, columns, TILE.D_V, TILE.BLOCK_DV, KIND)


@triton.jit
def program_of(call, blocks, heads):
    """This program's batch element or packed sequence, its head and its block."""
    if call.place is not None:
        return call.place.sequence, call.place.head, call.place.block
    element = tl.program_id(0) % call.together
    rest = tl.program_id(0) // call.together
    sequence = rest // blocks
    return sequence // heads * call.together + element, sequence % heads, rest % blocks


@triton.jit
def block_of_queries(call, TILE: tl.constexpr):
    """This program's head and its first query. The last queries come first: causality gives them the most work."""
    blocks = tl.cdiv(call.L, TILE.BLOCK_M)
    n, h, block = program_of(call, blocks, call.H)
    head = head_of(call, n, h)
    return head, (blocks - 1 - block if call.place is None else block) * TILE.BLOCK_M


@triton.jit
def tile_of_matrices(call, columns, TILE: tl.constexpr):
    """This program's tile of some matrices of L rows: which matrix, its first row and its first column."""
    row_blocks = tl.cdiv(call.L, TILE.BLOCK_M)
    column_blocks = tl.cdiv(columns, TILE.BLOCK_N)
    matrix = tl.program_id(0) // (row_blocks * column_blocks)
    first_row = tl.program_id(0) // column_blocks % row_blocks * TILE.BLOCK_M
    return matrix, first_row, tl.program_id(0) % column_blocks * TILE.BLOCK_N


@triton.jit
def all_rows(call):
    """How many there are, of all heads."""
    if call.place is not None:
        return tl.cast(call.H, tl.int64) * call.place.all_queries
    return tl.cast(call.N, tl.int64) * call.H * call.L


@triton.jit
def first_of_rows(call, head):
    """Where the rows of a head begin in a contiguous tensor (N, H, L)."""
    if call.place is not None:
        return head.h * call.place.all_queries + call.place.first_query
    return head.n * call.H * call.L + head.h * call.L


@triton.jit
def load_of_rows(tensor, call, head, rows):
    """Numbers of a contiguous tensor (N, H, L)."""
    return tl.load(tensor + first_of_rows(call, head) + rows, mask=rows < call.L, other=0.0)


@triton.jit
def is_kept(call, head, rows, first_column, TILE: tl.constexpr):
    """Whether dropout keeps a weight, (rows, BLOCK_N), from a column that 8 divides.

    Philox4x32-7 (Salmon et al., SC 2011) on the counter (key // 8, query, batch * H + head, offset); each of the 8
    halves of its words draws for one key. `csrc/generic/philox.h` draws the same, also for a part of a longer call.
    """
    each = zeros(rows.shape[0], TILE.BLOCK_N // 8, tl.int32)
    groups = each + (first_column // 8 + tl.arange(0, TILE.BLOCK_N // 8))[None, :]
    queries = each + rows[:, None]
    if TILE.PLACED:
        queries += tl.load(call.seed + 2).to(tl.int32)
        groups += (tl.load(call.seed + 3) // 8).to(tl.int32)
        sequence = each + (head.n * tl.load(call.seed + 5) + tl.load(call.seed + 4) + head.h).to(tl.int32)
    else:
        sequence = each + (head.n * call.H + head.h).to(tl.int32)
    offset = each + tl.load(call.seed + 1).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(call.seed), groups, queries, sequence, offset, n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # in the order a, b, c, d
    halves = tl.join(words << 16, words)  # the low one first; what is below the upper 16 bits decides nothing
    halves = tl.reshape(halves, zeros(rows.shape[0], TILE.BLOCK_N).shape)
    return halves >= (tl.cast(call.threshold, tl.uint32) << 16)

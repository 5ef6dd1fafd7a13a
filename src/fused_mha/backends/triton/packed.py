"""Packed sequences: which sequence a program works on, and which rows; `entry` makes a call of its own of them.

The grid is as large as the tokens and the sequences allow, since their lengths lie on the GPU and the host does not
wait for them. A program finds its sequence among the offsets as they lie there: a table of tiles would be a kernel more
to wait for, and a step of this search is one trip to memory. Offsets may hold anything: they are taken as if they were
within the rows there are, and never less than the one before.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

SEARCHED = tl.constexpr(128)  # parts of the offsets that a step of the search looks at


class Place(NamedTuple):
    """A program's sequence, and its own rows of it. The last sequence, of number N, has what is behind the offsets.

    The blocks of a sequence have slots in a row, the last of which may be left over: to its program, the sequence is
    empty.
    """

    sequence: Any
    head: Any  # of queries or of keys
    block: Any
    slot: Any
    slots: Any  # of all sequences
    first_query: Any
    queries: Any
    all_queries: Any  # of all sequences
    first_key: Any
    keys: Any
    all_keys: Any
    columns: Any  # the keys and the virtual ones


def slots(rows: int, sequences: int, block: int) -> int:
    """How many slots for blocks there are, whatever the lengths of the sequences are."""
    return rows // block + sequences + 1


@triton.jit
def place_of_program(cu_seqlens_q, cu_seqlens_k, N, L, S, virtual, BY_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Of N sequences with L queries and S keys in all, and so many virtual keys behind each of them."""
    offsets = cu_seqlens_k if BY_KEYS else cu_seqlens_q
    rows = S if BY_KEYS else L
    added = virtual if BY_KEYS else 0
    count = (rows + (N + 1) * added) // BLOCK + N + 1
    slot = tl.program_id(0) % count
    sequence = _sequence_of(slot, offsets, N, rows, added, BLOCK)
    first_query, queries = _rows_of(cu_seqlens_q, sequence, N, L)
    first_key, keys = _rows_of(cu_seqlens_k, sequence, N, S)
    columns = keys + virtual
    blocks = tl.cdiv(columns if BY_KEYS else queries, BLOCK)
    block = slot - _first_slot(first_key if BY_KEYS else first_query, sequence, added, BLOCK)
    is_there = (block >= 0) & (block < blocks)
    if not BY_KEYS:
        block = blocks - 1 - block  # causality gives the last queries the most work
    return Place(
        sequence=sequence,
        head=tl.program_id(0) // count,
        block=tl.where(is_there, block, 1),  # which has not even the column behind the keys
        slot=slot,
        slots=count,
        first_query=first_query,
        queries=tl.where(is_there, queries, 0),
        all_queries=L,
        first_key=first_key,
        keys=tl.where(is_there, keys, 0),
        all_keys=S,
        columns=tl.where(is_there, tl.where(sequence < N, columns, keys), 0),
    )


@triton.jit
def _first_slot(first_row, sequence, added, BLOCK: tl.constexpr):
    """Where the slots of a sequence begin: one more for each sequence before it than their whole blocks."""
    return (first_row + sequence * added) // BLOCK + sequence


@triton.jit
def _within(offset, rows):
    return tl.minimum(tl.maximum(offset, 0), rows).to(rows.dtype)


@triton.jit
def _rows_of(offsets, sequence, N, rows):
    """The first row of a sequence and how many it has."""
    first = _within(tl.load(offsets + sequence), rows)
    end = _within(tl.load(offsets + sequence + 1, mask=sequence < N, other=1 << 62), rows)
    return first, tl.maximum(end - first, 0)


@triton.jit
def _sequence_of(slot, offsets, N, rows, added, BLOCK: tl.constexpr):
    """The last sequence whose slots do not begin behind this one."""
    found = 0 * slot
    count = N + 1  # of sequences from there on, among which it is
    while count > 1:
        step = tl.cdiv(count, SEARCHED)
        parts = tl.arange(0, SEARCHED) * step
        sequences = found + parts
        first_rows = _within(tl.load(offsets + sequences, mask=parts < count, other=0), rows)
        is_before = (parts < count) & (_first_slot(first_rows, sequences, added, BLOCK) <= slot)
        part = tl.maximum(tl.sum(is_before.to(tl.int32), 0) - 1, 0) * step
        found += part
        count = tl.minimum(step, count - part)
    return found

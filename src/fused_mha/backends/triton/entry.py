"""The one kernel that is launched: it makes the `Call` of its arguments and runs the kernel that it is given.

`launch` calls it. Of packed sequences, the call is of the one that the program works on. Triton compiles a kernel anew
for a number that is 1 and for one that 16 divides, unless the number is an argument of its own that is not to be looked
at; so these are, and any lengths and strides run the same code.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fused_mha.backends.triton.assembler import assembled
from fused_mha.backends.triton.packed import place_of_program
from fused_mha.backends.triton.tiles import PADDING_UNIT, TENSORS, Call, multiple


def _name(specialized: Any) -> str:
    """What profilers show."""
    return specialized.constants["KERNEL"].__name__


@assembled
@triton.jit(do_not_specialize=Call._fields[TENSORS:], repr=_name)
def entry(
    KERNEL: tl.constexpr,
    tensors,
    operands,
    query_n,
    query_l,
    query_h,
    key_n,
    key_l,
    key_h,
    value_n,
    value_l,
    value_h,
    output_n,
    output_l,
    grad_query_n,
    grad_query_l,
    grad_key_n,
    grad_key_l,
    grad_value_n,
    grad_value_l,
    mask_n,
    mask_h,
    mask_l,
    together,
    mask_batches,
    mask_heads,
    squares_n,
    squares_h,
    padding_n,
    N,
    L,
    S,
    columns,
    H,
    group,
    first_visible,
    last_visible,
    scale,
    threshold,
    kept_factor,
    diagonal,
    softcap,
    place,
    TILE: tl.constexpr,
):
    """Runs `KERNEL(call, *operands, TILE)`."""
    UNIT: tl.constexpr = 128 // tensors[0].dtype.element_ty.primitive_bitwidth  # elements of 16 bytes
    query, key, value, attn_mask, padding, squares, bias_k, bias_v, seed, sinks, slopes, of_queries, of_keys = tensors
    if of_queries is not None:
        BLOCK: tl.constexpr = TILE.BLOCK_N if TILE.BY_KEYS else TILE.BLOCK_M
        place = place_of_program(of_queries, of_keys, N, L, S, columns - S, TILE.BY_KEYS, BLOCK)
        query += place.first_query.to(tl.int64) * multiple(query_l, UNIT)
        key += place.first_key.to(tl.int64) * multiple(key_l, UNIT)
        value += place.first_key.to(tl.int64) * multiple(value_l, UNIT)
        if padding is not None:
            padding += place.first_key
        diagonal = (place.keys - place.queries) * diagonal
        first_visible += diagonal
        last_visible = tl.where(place.sequence < N, last_visible + diagonal, -(L + S + 1))
        L, S, columns = place.queries, place.keys, place.columns
    call = Call(
        query,
        key,
        value,
        attn_mask,
        padding,
        squares,
        bias_k,
        bias_v,
        seed,
        sinks,
        slopes,
        of_queries,
        of_keys,
        multiple(query_n, UNIT),
        multiple(query_l, UNIT),
        multiple(query_h, UNIT),
        multiple(key_n, UNIT),
        multiple(key_l, UNIT),
        multiple(key_h, UNIT),
        multiple(value_n, UNIT),
        multiple(value_l, UNIT),
        multiple(value_h, UNIT),
        multiple(output_n, UNIT),
        multiple(output_l, UNIT),
        multiple(grad_query_n, UNIT),
        multiple(grad_query_l, UNIT),
        multiple(grad_key_n, UNIT),
        multiple(grad_key_l, UNIT),
        multiple(grad_value_n, UNIT),
        multiple(grad_value_l, UNIT),
        multiple(mask_n, TILE.MASK_UNIT),
        multiple(mask_h, TILE.MASK_UNIT),
        multiple(mask_l, TILE.MASK_UNIT),
        together,
        mask_batches,
        mask_heads,
        squares_n,
        squares_h,
        multiple(padding_n, PADDING_UNIT),
        N,
        L,
        S,
        columns,
        H,
        group if TILE.GROUPED else 1,
        first_visible,
        last_visible,
        scale,
        threshold,
        kept_factor,
        diagonal,
        softcap,
        place,
    )
    KERNEL(call, *operands, TILE)

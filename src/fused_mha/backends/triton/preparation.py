"""What the kernels of a call are given and compiled for, by the operator's arguments; `launch` asks.

The arguments are those that `readable` gives. Nothing here reads a tensor or allocates one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_mha.backends.triton import assembler, packed, readable
from fused_mha.backends.triton.tile_config import Config, Kind, Launch, config
from fused_mha.backends.triton.tiles import TENSORS, Call, Tile
from fused_mha.backends.triton.visibility import SQUARE
from fused_mha.core.inputs import checked_weights_of_heads
from fused_mha.core.memory import unit_of
from fused_mha.ops.schema import Arguments, drawn_probability

SMALLEST_BLOCK = 16  # of a side of a product
MOST_TOGETHER = 8  # batch elements: more would take their keys out of the cache
LEAST_SCORES = 1 << 24  # of a call, from which on its mask is searched for tiles to skip


class Layout(NamedTuple):
    """Strides of batch elements and of rows in what kernels write; heads are contiguous."""

    output: tuple[int, int]
    grad_query: tuple[int, int]
    grad_key: tuple[int, int]
    grad_value: tuple[int, int]

    @classmethod
    def contiguous(cls, a: Arguments) -> Layout:
        """Of results that are as those of the operators."""
        (_, L, H, _), (_, S, H_kv, D), D_v = a.query.shape, a.key.shape, a.value.shape[3]
        rows = ((L, H * D_v), (L, H * D), (S, H_kv * D), (S, H_kv * D_v))
        return cls(*((length * size, size) for length, size in rows))


def prepare(arguments: Arguments, layout: Layout) -> tuple[Call, Config]:
    """The numbers of the call, its tensors None, and how its kernels are launched."""
    query, key, value, mask, padding = arguments[:5]
    _, L, H, D = query.shape
    S, H_kv = key.shape[1:3]
    far = L + S + 1  # beyond every key
    first, last, p = arguments.first_visible, arguments.last_visible, drawn_probability(arguments.dropout_p)
    squares = squares_shape(arguments)
    numbers: list[Any] = [
        *readable.strides(query),
        *readable.strides(key),
        *readable.strides(value),
        *(stride for n, rows in layout for stride in (0 if is_packed(arguments) else n, rows)),
        *((0, 0, 0) if mask is None else readable.strides(mask)),
        _together(arguments),
        0 if mask is None else mask.shape[0],
        0 if mask is None else mask.shape[1],
        0 if squares is None or squares[0] == 1 else math.prod(squares[1:]),
        0 if squares is None or squares[1] == 1 else math.prod(squares[2:]),
        0 if padding is None or padding.shape[0] == 1 else padding.stride(0),
        sequences_of(arguments),
        L,
        S,
        arguments.columns,
        H,
        H // H_kv,
        -far if first is None else max(first, -far),
        far if last is None else min(last, far),
        arguments.scale,
        min(int(p * 65536), 65535),
        1 / (1 - p) if p < 1.0 else 0.0,
        _diagonal(arguments),
        arguments.softcap,
        None,
    ]
    call = Call._make([None] * TENSORS + numbers)
    return call, config(_shared_memory(query.device), query.dtype, max(D, value.shape[3]), _kind(arguments))


def _diagonal(a: Arguments) -> int | None:
    if is_packed(a):
        return int(a.bottom_right)
    L, S = a.query.shape[1], a.key.shape[1]
    return None if a.alibi_slopes is None else S - L if a.bottom_right else 0


def is_packed(a: Arguments) -> bool:
    """Whether the rows are those of packed sequences."""
    return a.cu_seqlens_q is not None


def sequences_of(a: Arguments) -> int:
    """How many packed sequences there are; batch elements without."""
    return a.query.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1


def blocks_of_queries(a: Arguments, block: int) -> int:
    """How many programs each head of queries has, in blocks of so many."""
    L = a.query.shape[1]
    return packed.slots(L, sequences_of(a), block) if is_packed(a) else sequences_of(a) * blocks(L, block)


def blocks_of_keys(a: Arguments, block: int) -> int:
    """The same of keys and virtual keys."""
    N, S, virtual = sequences_of(a), a.key.shape[1], a.columns - a.key.shape[1]
    return packed.slots(S + (N + 1) * virtual, N, block) if is_packed(a) else N * blocks(a.columns, block)


def squares_shape(a: Arguments) -> tuple[int, int, int, int] | None:
    """Of what a search of the mask for tiles to skip finds; None where it is not searched."""
    mask = a.attn_mask
    if mask is None or not _pays_to_search(mask, a):
        return None
    batches, heads = mask.shape[:2]
    return batches, heads, blocks(a.query.shape[1], SQUARE.value), blocks(a.key.shape[1], SQUARE.value)


def _together(a: Arguments) -> int:
    """How many batch elements, if they share an attn_mask that heads do not: its tiles are read once from memory."""
    mask, N = a.attn_mask, a.query.shape[0]
    if mask is None or mask.shape[0] > 1 or mask.shape[1] == 1:
        return 1
    return max(count for count in range(1, MOST_TOGETHER + 1) if N % count == 0)


def _kind(a: Arguments) -> Kind:
    if a.attn_mask is not None and a.attn_mask.is_floating_point():
        return Kind.FLOAT_MASK
    if a.seed is not None:
        return Kind.DROPOUT
    return Kind.PLAIN if a.attn_mask is None else Kind.BOOL_MASK


def tile_of(arguments: Arguments, launch: Launch) -> Tile:
    """What a kernel is compiled for that reads and writes no weights."""
    mask, padding = arguments.attn_mask, arguments.key_padding_mask
    is_natural = not arguments.scale > 0 or arguments.softcap is not None or arguments.alibi_slopes is not None
    is_natural = is_natural or any(x is not None and x.is_floating_point() for x in (mask, padding))
    D, D_v = arguments.query.shape[3], arguments.value.shape[3]
    block_d, block_dv = (max(1 << (size - 1).bit_length(), SMALLEST_BLOCK) for size in (D, D_v))
    if not _assembler_is_right(arguments.query.device):
        block_d = block_dv = max(block_d, block_dv)  # its code is wrong where these differ
    return Tile(
        D,
        D_v,
        launch.BLOCK_M,
        launch.BLOCK_N,
        block_d,
        block_dv,
        VIRTUAL=arguments.columns > arguments.key.shape[1],
        NATURAL=is_natural,
        EXACT=is_natural or arguments.query.dtype == torch.float32,
        GROUPED=arguments.query.shape[2] > arguments.key.shape[2],
        AVERAGED=False,
        MASK_UNIT=1 if mask is None else readable.unit_of_mask(mask),
        WEIGHTS_UNIT=1,
        PRECISION="tf32" if arguments.query.dtype == torch.float32 and allows_tf32() else "ieee",
        PLACED=arguments.seed is not None and arguments.seed.shape[0] > 2,
        BY_KEYS=False,
    )


def with_weights(tile: Tile, arguments: Arguments) -> Tile:
    """The same of one that does."""
    unit = unit_of(arguments.query)
    rows_are_aligned = arguments.columns % unit == 0
    return tile._replace(AVERAGED=arguments.average_attn_weights, WEIGHTS_UNIT=unit if rows_are_aligned else 1)


def named_heads(a: Arguments) -> Tensor | None:
    """The heads whose weights are asked for: their number n, the place of each of H among them or -1, and the n heads.

    None where there is no choice of heads.
    """
    if not a.weights_of_heads:
        return None
    heads = checked_weights_of_heads(list(a.weights_of_heads), a.query.shape[2], a.average_attn_weights)
    places = [heads.index(h) if h in heads else -1 for h in range(a.query.shape[2])]
    return torch.tensor([len(heads), *places, *heads], dtype=torch.int32, device=a.query.device)


def may_hide_queries(a: Arguments) -> bool:
    """Whether there may be a query that sees no key, beside one that does."""
    has_mask = a.attn_mask is not None or a.key_padding_mask is not None
    in_band = a.first_visible is None and (a.last_visible or 0) >= 0
    if is_packed(a) and a.bottom_right and a.last_visible is not None:  # of more queries than keys
        in_band = False
    return a.columns == a.key.shape[1] and (has_mask or not in_band)


def _pays_to_search(mask: Tensor, a: Arguments) -> bool:
    """Whether the call is large, and so many heads share the mask that to read it once more is cheap.

    A float mask, as that of relative positions, seldom hides a whole tile.
    """
    batch, length, heads, _ = a.query.shape
    scores = batch * heads * length * a.key.shape[1]
    least = 8 if mask.is_floating_point() else 2  # heads to a byte
    return scores >= LEAST_SCORES and least * mask.element_size() * mask.numel() <= scores


def blocks(size: int, block: int) -> int:
    """How many it takes to hold so many."""
    return -(-size // block)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _assembler_is_right(device: torch.device) -> bool:
    return device.type != "cuda" or assembler.of_device(device.index).is_right


def allows_tf32() -> bool:
    """Whether torch's own products of fp32 matrices may round to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"

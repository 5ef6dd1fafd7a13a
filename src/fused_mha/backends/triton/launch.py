"""From the operators' arguments to the kernels: `attention` and `attention_backward` of ops/schema.py on CUDA.

`backends.triton` registers them. Every grid has one dimension: the others of a CUDA grid end at 65,535.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from fused_mha.backends.triton import assembler
from fused_mha.backends.triton import backward as kernels_of_backward
from fused_mha.backends.triton.backward import Given
from fused_mha.backends.triton.entry import entry
from fused_mha.backends.triton.forward import forward
from fused_mha.backends.triton.tile_config import MOST_OF_TORCH, Config, Kind, Launch, config
from fused_mha.backends.triton.tiles import MOST_ROWS, PADDING_UNIT, TENSORS, Call, Searched, Tile
from fused_mha.backends.triton.visibility import SQUARE, mask_squares
from fused_mha.backends.triton.weights import weights as weights_kernel
from fused_mha.ops import gradients
from fused_mha.ops.schema import Arguments, drawn_probability

SMALLEST_BLOCK = 16  # of a side of a product
LARGEST_OF_FLASH = 128  # head size
MASK = Launch(BLOCK_M=SQUARE.value, BLOCK_N=512, num_warps=4, num_stages=1)
LEAST_SCORES = 1 << 24  # of a call, from which on its mask is searched for tiles to skip


def attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, weights or an empty tensor, log-sum-exp, and the rows' maxima and sums."""
    wanted = Arguments(*inputs)
    arguments, query, D_v = _readable_arguments(wanted), wanted.query, wanted.value.shape[3]
    N, L, H, _ = query.shape
    weights = query.new_empty(arguments.weights_shape)
    with _on_device_of(query):
        call, launch = prepare(arguments)
        if arguments.need_weights and _flash_serves(wanted):
            output, lse, stats = _flash_forward(arguments)
        else:
            output = query.new_empty((N, L, H, arguments.value.shape[3]))
            lse, stats = (query.new_empty((*sizes, N, H, L), dtype=torch.float32) for sizes in ((), (2,)))
            tiling = launch.forward
            tile = tile_of(arguments, tiling)
            _run(forward, N * H * _blocks(L, tiling.BLOCK_M), tiling, call, output, lse, stats, tile)
        if arguments.need_weights:
            tiling = launch.weights
            matrices = N if arguments.average_attn_weights else N * H
            tiles = _blocks(L, tiling.BLOCK_M) * _blocks(arguments.columns, tiling.BLOCK_N)
            tile = with_weights(tile_of(arguments, tiling), arguments)
            _run(weights_kernel, matrices * tiles, tiling, call, stats, weights, tile)
    return _first(output, D_v), weights, lse, stats


def attention_gradients(
    grad_output: Tensor,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    stats: Tensor,
    mask_grad: bool,
    columns_grad: bool,
    *inputs: Any,
) -> tuple[Tensor, ...]:
    """Those of query, key, value, mask, columns of scores, and of the biases for each batch element."""
    wanted = Arguments(*inputs)
    arguments = _readable_arguments(wanted)
    query, key, value = arguments[:3]
    N, L, H, _ = query.shape
    S, H_kv = key.shape[1:3]
    unit = _unit(query)

    def empty(is_wanted: bool, *shape: int) -> Tensor:
        return query.new_empty(shape if is_wanted else (0,), dtype=torch.float32)

    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    mask = wanted.attn_mask
    grad_mask = empty(False) if mask is None else empty(mask_grad, *mask.shape[:2], L, S)
    grad_columns = empty(columns_grad, N, H, S)
    has_bias = arguments.bias_k is not None
    grad_bias_k, grad_bias_v = (empty(has_bias, N, H_kv, x.shape[3]) for x in (key, value))
    output = _readable(output.contiguous(), unit)
    given = Given(
        _readable(grad_output.contiguous(), unit),
        None if grad_weights is None else _readable(grad_weights.contiguous(), 1),
        None if grad_lse is None else _readable(grad_lse.contiguous(), 1),
        output,
        _readable(stats.contiguous(), 1),
        empty(True, N, H, 3, _blocks(L, MOST_ROWS.value) * MOST_ROWS.value),
        output.new_empty(output.shape) if _may_hide_queries(arguments) else None,
    )

    def tile(tiling: Launch) -> Tile:
        found = tile_of(arguments, tiling)
        return found if grad_weights is None else with_weights(found, arguments)

    with _on_device_of(query):
        call, launch = prepare(arguments)
        tiling = launch.grad_query
        programs = N * H * _blocks(L, tiling.BLOCK_M)
        _run(kernels_of_backward.grad_query, programs, tiling, call, given, grad_query, tile(tiling))
        if given.cleaned is not None:
            given = given._replace(grad_output=given.cleaned, cleaned=None)
        if mask_grad and mask is not None:
            batches, heads = mask.shape[:2]
            programs = batches * heads * _blocks(L, tiling.BLOCK_M) * _blocks(S, tiling.BLOCK_N)
            of_mask = call._replace(mask_batches=batches, mask_heads=heads)
            _run(kernels_of_backward.grad_mask, programs, tiling, of_mask, given, grad_mask, tile(tiling))
        tiling = launch.grad_key_value
        _run(
            kernels_of_backward.grad_key_value,
            N * H_kv * _blocks(arguments.columns, tiling.BLOCK_N),
            tiling,
            call,
            given,
            grad_key,
            grad_value,
            grad_columns if columns_grad else None,
            grad_bias_k if has_bias else None,
            grad_bias_v if has_bias else None,
            tile(tiling),
        )
    D, D_v = wanted.query.shape[3], wanted.value.shape[3]
    grad_query, grad_key = _first(grad_query, D), _first(grad_key, D)
    if has_bias:
        grad_bias_k, grad_bias_v = _first(grad_bias_k, D), _first(grad_bias_v, D_v)
    return grad_query, grad_key, _first(grad_value, D_v), grad_mask, grad_columns, grad_bias_k, grad_bias_v


attention_backward = functools.partial(gradients.attention_backward, attention_gradients)


def _may_hide_queries(a: Arguments) -> bool:
    """Whether there may be a query that sees no key."""
    has_mask = a.attn_mask is not None or a.key_padding_mask is not None
    in_band = a.first_visible is None and (a.last_visible or 0) >= 0
    return a.columns == a.key.shape[1] and (has_mask or not in_band)


def _flash_serves(a: Arguments) -> bool:
    """Whether torch's flash kernel, the faster one, computes the forward of a call whose weights come after it."""
    if any(x is not None for x in a[3:8]) or a.add_zero_attn or a.first_visible is not None or not a.scale > 0:
        return False
    batch, length, heads, size = a.query.shape
    is_plain = a.last_visible is None or (a.last_visible == 0 and a.key.shape[1] == length)
    return (
        (is_plain and length > 1 and a.key.shape[2] == heads and batch * heads <= MOST_OF_TORCH)
        and (a.value.shape[3] == size and size % 8 == 0 and size <= LARGEST_OF_FLASH)
        and (a.query.dtype in (torch.float16, torch.bfloat16) and _has_flash(a.query.device))
    )


def _flash_forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and statistics; with the log-sum-exp for the maximum, all sums are 1."""
    heads = (x.transpose(1, 2) for x in (a.query, a.key, a.value))
    output, lse, *_ = _flash_attention(*heads, 0.0, a.last_visible == 0, False, scale=a.scale)
    lse = lse.contiguous()
    return output.transpose(1, 2).contiguous(), lse, torch.stack((lse / a.scale, torch.ones_like(lse)))


_flash_attention: Any = torch.ops.aten._scaled_dot_product_flash_attention


def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda"


def _readable_arguments(a: Arguments) -> Arguments:
    """The same call, of tensors as `Call` has them; odd head sizes are filled up by zeros."""
    unit = _unit(a.query)
    query, key, value = (_readable(x, unit) for x in a[:3])
    mask, padding = (None if x is None else _bytes(_last_contiguous(_unexpanded(x))) for x in a[3:5])
    padding = None if padding is None else _readable(padding, PADDING_UNIT.value)
    biases = (None if x is None else _readable(x.contiguous(), unit) for x in a[5:7])
    seed = None if a.seed is None else _readable(a.seed.contiguous(), 1)
    return Arguments.of((query, key, value, mask, padding, *biases, seed), a[8:])


def prepare(arguments: Arguments) -> tuple[Call, Config]:
    """What `_readable_arguments` gives as kernels take it, and how these are launched."""
    query, key, value, mask, padding, bias_k, bias_v, seed = arguments[:8]
    N, L, H, D = query.shape
    S, H_kv = key.shape[1:3]
    far = L + S + 1  # beyond every key
    first, last, p = arguments.first_visible, arguments.last_visible, drawn_probability(arguments.dropout_p)
    call = Call(
        query,
        key,
        value,
        mask,
        padding,
        None,  # squares
        bias_k,
        bias_v,
        seed,
        *_strides(query),
        *_strides(key),
        *_strides(value),
        *((0, 0, 0) if mask is None else _strides(mask)),
        0 if mask is None else mask.shape[0],
        0 if mask is None else mask.shape[1],
        0,  # of squares
        0,
        0 if padding is None or padding.shape[0] == 1 else padding.stride(0),
        N,
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
    )
    if mask is not None and _pays_to_search(mask, arguments):
        call = _with_squares(call, mask)
    return call, config(_shared_memory(query.device), query.dtype, max(D, value.shape[3]), _kind(arguments))


def _kind(a: Arguments) -> Kind:
    if a.attn_mask is not None and a.attn_mask.dtype != torch.uint8:
        return Kind.FLOAT_MASK
    if a.seed is not None:
        return Kind.DROPOUT
    return Kind.PLAIN if a.attn_mask is None else Kind.BOOL_MASK


def tile_of(arguments: Arguments, launch: Launch) -> Tile:
    """What a kernel is compiled for that reads and writes no weights."""
    mask, padding = arguments.attn_mask, arguments.key_padding_mask
    is_natural = not arguments.scale > 0 or any(x is not None and x.dtype != torch.uint8 for x in (mask, padding))
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
        GROUPED=arguments.query.shape[2] > arguments.key.shape[2],
        AVERAGED=False,
        MASK_UNIT=1 if mask is None else _mask_unit(mask),
        WEIGHTS_UNIT=1,
        PRECISION="tf32" if arguments.query.dtype == torch.float32 and _allows_tf32() else "ieee",
    )


def with_weights(tile: Tile, arguments: Arguments) -> Tile:
    """The same of one that does."""
    unit = _unit(arguments.query)
    rows_are_aligned = arguments.columns % unit == 0
    return tile._replace(AVERAGED=arguments.average_attn_weights, WEIGHTS_UNIT=unit if rows_are_aligned else 1)


def _pays_to_search(mask: Tensor, a: Arguments) -> bool:
    """Whether the call is large, and so many heads share the mask that to read it once more is cheap."""
    batch, length, heads, _ = a.query.shape
    scores = batch * heads * length * a.key.shape[1]
    return scores >= LEAST_SCORES and 2 * mask.element_size() * mask.numel() <= scores


def _with_squares(call: Call, mask: Tensor) -> Call:
    """The call, and what its mask does to squares of scores."""
    batches, heads = mask.shape[:2]
    sizes = (_blocks(call.L, SQUARE.value), _blocks(call.S, SQUARE.value))
    squares = mask.new_empty((batches, heads, *sizes), dtype=torch.uint8)
    programs = batches * heads * sizes[0] * _blocks(call.S, MASK.BLOCK_N)
    _run(mask_squares, programs, MASK, call, squares, Searched(MASK.BLOCK_N, GROUPED=False, MASK_UNIT=_mask_unit(mask)))
    squares_n, squares_h, _ = _strides(squares)
    return call._replace(squares=squares, squares_n=squares_n, squares_h=squares_h)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _run(kernel: Any, programs: int, launch: Launch, call: Call, *operands_and_tile: Any) -> None:
    *operands, tile = operands_and_tile
    how = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    entry[(programs,)](kernel, call[:TENSORS], *call[TENSORS:], tuple(operands), tile, **how)


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; the interpreter of its tests has none."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _assembler_is_right(device: torch.device) -> bool:
    return device.type != "cuda" or assembler.of_device(device.index).is_right


def _allows_tf32() -> bool:
    """Whether torch's own products of fp32 matrices may round to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of the first dimensions; 0 where there is only one to reach."""
    n, i, j = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return n, i, j


def _unexpanded(x: Tensor) -> Tensor:
    """Size 1 in the dimensions but the last along which nothing changes."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride()[:-1])] if 0 in x.stride() else x


def _unit(x: Tensor) -> int:
    """How many elements 16 bytes have, which the memory gives at once."""
    return 16 // x.element_size()


def _readable(x: Tensor, unit: int) -> Tensor:
    """The tensor at a multiple of 16 bytes, with rows and strides that ``unit`` divides; else a copy, with zeros."""
    size = x.shape[-1]
    if size % unit:
        filled = x.new_zeros((*x.shape[:-1], size + -size % unit))
        filled[..., :size] = x
        return filled
    strides = (stride % unit for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if length > 1)
    if x.stride(-1) == 1 and not any(strides) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _first(x: Tensor, size: int) -> Tensor:
    """So many elements of each row, without what `_readable` filled up."""
    return x if x.shape[-1] == size else x[..., :size].contiguous()


def _mask_unit(mask: Tensor) -> int:
    """Of its elements, 16 bytes if its address and its strides are multiples of that, else 1."""
    unit = _unit(mask)
    return unit if mask.data_ptr() % 16 == 0 and not any(stride % unit for stride in _strides(mask)) else 1


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask

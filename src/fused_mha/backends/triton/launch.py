"""From the operators' arguments to the kernels: `attention` and `attention_backward` of ops/schema.py on CUDA.

`backends.triton` registers them, and `eager` keeps a `Plan` for the next call of the same kind. Every grid has one
dimension: the others of a CUDA grid end at 65,535.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_mha.backends.delegation import MOST_HEADS_OF_TORCH
from fused_mha.backends.triton import backward as kernels_of_backward
from fused_mha.backends.triton import preparation, readable
from fused_mha.backends.triton.forward import forward
from fused_mha.backends.triton.gradient_tile import TERMS_UNIT, Given
from fused_mha.backends.triton.launcher import Launcher, Tensors, on_device
from fused_mha.backends.triton.preparation import Layout, blocks, prepare, squares_shape, tile_of, with_weights
from fused_mha.backends.triton.tile_config import Launch
from fused_mha.backends.triton.tiles import MOST_ROWS, Call, Searched
from fused_mha.backends.triton.visibility import SQUARE, mask_squares
from fused_mha.backends.triton.weights import weights as weights_kernel
from fused_mha.core.memory import memory_of, unit_of
from fused_mha.ops import gradients
from fused_mha.ops.schema import TENSORS, Arguments

LARGEST_OF_FLASH = 128  # head size
# From so many scores on. At 2^30, torch's flash kernel was 0.14 ms faster on an H100; the ten operators around it take
# some 50 microseconds of host time (benchmarks/host_time.py).
LEAST_SCORES_OF_FLASH = 1 << 26
MASK = Launch(BLOCK_M=SQUARE.value, BLOCK_N=512, num_warps=4, num_stages=1)
DEVICE, MOST_PLANS = "cuda", 1024  # on which plans are kept, a few kilobytes each
_NO_BIASES = (None, None)
_GIVEN = ("grad_output", "grad_weights", "grad_lse", "output", "stats")
Maker = Callable[[], Tensor]


def attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, weights or an empty tensor, log-sum-exp, and the rows' maxima and sums."""
    arguments = Arguments(*inputs)
    output, weights, lse, stats = plan_of(arguments).forward(arguments[:TENSORS])
    return output, output.new_empty((0,)) if weights is None else weights, lse, stats


def attention_gradients(
    grad_output: Tensor,
    grad_weights: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    stats: Tensor,
    mask_grad: bool,
    columns_grad: bool,
    *inputs: Any,
) -> tuple[Any, ...]:
    """What the operator of that name gives, None for an empty tensor; of sinks and distances, the whole sums with sizes
    of 1.
    """
    arguments = Arguments(*inputs)
    grads = (grad_output, grad_weights, grad_lse)
    of_output, of_weights, of_lse, of_stats = results_of(arguments)
    expected = (of_output, of_weights, of_lse, of_output, of_stats)
    for name, x, wanted in zip(_GIVEN, (*grads, output, stats), expected, strict=True):
        if x is not None and (found := (tuple(x.shape), x.dtype, x.device)) != wanted:  # a hook may give back any
            texts = ("{} of {} on {}".format(*of) for of in (wanted, found))
            raise RuntimeError("{} must be {}; got {}".format(name, *texts))
    return plan_of(arguments).gradients(arguments[:TENSORS], grads, output, stats, mask_grad, columns_grad)


attention_backward = functools.partial(gradients.attention_backward, attention_gradients)


def results_of(a: Arguments) -> tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]:
    """Shape, dtype and device of the output, the weights, the log-sum-exp and the statistics."""
    N, L, H, _ = a.query.shape
    dtype, device = a.query.dtype, a.query.device
    return (
        ((N, L, H, a.value.shape[3]), dtype, device),
        (a.weights_shape, dtype, device),
        ((N, H, L), torch.float32, device),
        ((2, N, H, L), torch.float32, device),
    )


def plan_of(arguments: Arguments) -> Plan:
    """That of calls of the operators with tensors of the same memory, which come again."""
    if arguments.query.device.type != DEVICE:
        return Plan(arguments)
    memory = (None if x is None else memory_of(x) for x in arguments[:TENSORS])
    *numbers, heads = arguments[TENSORS:]  # the dispatcher makes a list of these
    kind = (*memory, *numbers, tuple(heads or ()), preparation.allows_tf32())
    plan = _plans.get(kind)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[kind] = Plan(arguments)
    return plan


_plans: dict[tuple[object, ...], Plan] = {}


class _Backward(NamedTuple):
    """The kernels of a backward, and what makes the tensors that they write; None where they write none."""

    grad_query: Launcher
    grad_mask: Launcher | None
    grad_key_value: Launcher
    grads: tuple[Maker, ...]  # of query, key, value
    of_mask: Maker | None
    of_columns: Maker | None
    of_biases: tuple[Maker, ...]
    of_sinks: Maker | None  # for each block of queries
    of_slopes: Maker | None  # likewise
    terms: Maker
    cleaned: Maker | None


class Plan:
    """How a call's kernels are launched: what the sizes, strides and dtypes of its tensors and its flags decide, and
    whether the tensors lie at multiples of 16 bytes.

    It serves every call of which all these are the same, and holds none of their tensors. A backward has a plan of
    its own where what was saved for it lies otherwise than what the forward was given. Results are contiguous, unless a
    layout is given: then the output and its gradient lie so, and the caller gives the tensors of the other gradients.
    """

    def __init__(self, wanted: Arguments, layout: Layout | None = None) -> None:
        a = readable.arguments(wanted)
        pairs = zip(wanted[:TENSORS], a[:TENSORS], strict=True)
        self._is_readable = all(x is None or y is None or x.data_ptr() == y.data_ptr() for x, y in pairs)
        self._numbers = wanted[TENSORS:]
        self._mask_sizes = None if wanted.attn_mask is None else tuple(wanted.attn_mask.shape[:2])
        self._head_sizes = wanted.query.shape[3], wanted.value.shape[3]
        self._device = wanted.query.device
        self._index = self._device.index if self._device.type == "cuda" else None
        self._unit = unit_of(wanted.query)
        self._flash_is_causal = wanted.last_visible == 0 if wanted.need_weights and _flash_serves(wanted) else None
        self._fills_up = any(size % self._unit for size in self._head_sizes)
        self._has_layout = layout is not None
        layout = layout or Layout.contiguous(a)
        self._call, self._tiling = prepare(a, layout)
        N, L, H, _ = a.query.shape
        tiling = self._tiling.forward
        programs = H * preparation.blocks_of_queries(a, tiling.BLOCK_M)
        tile = tile_of(a, tiling)
        self._precision = tile.PRECISION  # of the backward too, whenever that is planned
        self._forward = Launcher(forward, programs, tiling, self._call, tile)
        D_v = a.value.shape[3]
        self._output = self._maker((N, L, H, D_v), a.query.dtype, (*layout.output, D_v, 1))
        self._lse, self._stats = (self._maker((*two, N, H, L), torch.float32) for two in ((), (2,)))
        self._search = self._weights = None
        self._named = preparation.named_heads(a)
        if (squares := squares_shape(a)) is not None and a.attn_mask is not None:
            programs = math.prod(squares[:3]) * blocks(self._call.S, MASK.BLOCK_N)
            searched = Searched(MASK.BLOCK_N, GROUPED=False, MASK_UNIT=readable.unit_of_mask(a.attn_mask))
            self._search = (
                Launcher(mask_squares, programs, MASK, self._call, searched),
                self._maker(squares, torch.uint8),
            )
        if a.need_weights:
            tiling = self._tiling.weights
            programs = math.prod(a.weights_shape[:-2]) * blocks(L, tiling.BLOCK_M) * blocks(a.columns, tiling.BLOCK_N)
            launcher = Launcher(weights_kernel, programs, tiling, self._call, with_weights(tile_of(a, tiling), a))
            self._weights = launcher, self._maker(a.weights_shape, a.query.dtype)
        self._backward: dict[tuple[bool, ...], _Backward] = {}

    def forward(self, tensors: Tensors) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Output, weights or None, log-sum-exp, and the rows' maxima and sums."""
        with on_device(self._index):
            given = self._given(tensors)
            output = self._output()
            if self._flash_is_causal is not None:
                lse, stats = _flash_forward(given, self._flash_is_causal, self._call.scale, output)
            else:
                lse, stats = self._lse(), self._stats()
                self._forward(given, (output, lse, stats))
            weights = None
            if self._weights is not None:
                launcher, maker = self._weights
                weights = maker()
                launcher(given, (stats, weights, self._named))
        return readable.first(output, self._head_sizes[1]) if self._fills_up else output, weights, lse, stats

    def gradients(
        self,
        tensors: Tensors,
        grads: tuple[Tensor, Tensor | None, Tensor | None],
        output: Tensor,
        stats: Tensor,
        mask_grad: bool,
        columns_grad: bool,
        results: tuple[Tensor, Tensor, Tensor] | None = None,
        slopes_grad: bool = True,
        are_rows: bool = False,
    ) -> tuple[Any, ...]:
        """Those of query, key, value, mask, columns of scores, of the biases for each batch element, of the sinks,
        (1, H), and of the distances that ALiBi goes by, (1, H, 1); or None.

        ``are_rows`` says that the kernels read the gradients, ``output`` and ``stats`` as they are, as `reads` finds.
        """
        with on_device(self._index):
            call = self._given(tensors)
            of = (grads[1] is not None, grads[2] is not None, mask_grad, columns_grad, slopes_grad)
            plan = self._backward.get(of)
            if plan is None:
                plan = self._backward[of] = self._plan_backward(self._readable(tensors), of)
            grad_output, grad_weights, grad_lse = grads
            if not are_rows:
                grad_output, grad_weights, grad_lse, output, stats = self._rows(grads, output, stats)
            terms, named = plan.terms(), None if grad_weights is None else self._named
            cleaned = None if plan.cleaned is None else plan.cleaned()
            given = (grad_output, grad_weights, grad_lse, output, stats, terms, cleaned, named)
            grad_query, grad_key, grad_value = results or [maker() for maker in plan.grads]
            grad_sinks = None if plan.of_sinks is None else plan.of_sinks()
            grad_slopes = None if plan.of_slopes is None else plan.of_slopes()
            plan.grad_query(call, (*given, grad_query, grad_sinks, grad_slopes))
            if cleaned is not None:
                given = (cleaned, grad_weights, grad_lse, output, stats, terms, None, named)
            grad_mask = None
            if plan.grad_mask is not None and plan.of_mask is not None:
                grad_mask = plan.of_mask()
                plan.grad_mask(call, (*given, grad_mask))
            grad_columns = None if plan.of_columns is None else plan.of_columns()
            grad_biases = [maker() for maker in plan.of_biases] or _NO_BIASES
            plan.grad_key_value(call, (*given, grad_key, grad_value, grad_columns, *grad_biases))
            of_sinks = None if grad_sinks is None else grad_sinks.sum((0, 2)).unsqueeze(0)
            of_distances = None if grad_slopes is None else grad_slopes.sum((0, 2), keepdim=True)
        if not self._fills_up:
            return grad_query, grad_key, grad_value, grad_mask, grad_columns, *grad_biases, of_sinks, of_distances
        D, D_v = self._head_sizes
        of_rows = zip((grad_query, grad_key, grad_value, *grad_biases), (D, D, D_v, D, D_v), strict=True)
        first = [None if x is None else readable.first(x, size) for x, size in of_rows]
        return *first[:3], grad_mask, grad_columns, *first[3:], of_sinks, of_distances

    def reads(self, grads: Tensors, output: Tensor, stats: Tensor) -> bool:
        """Whether the kernels of the backward read these as they are."""
        given = (*grads, output, stats)
        return all(x is y for x, y in zip(given, self._rows(grads, output, stats), strict=True))

    def _rows(self, grads: Tensors, output: Tensor, stats: Tensor) -> tuple[Any, ...]:
        grad_output, *of_others = grads
        others = [None if x is None else readable.rows(x.contiguous(), 1) for x in (*of_others, stats)]
        as_output = [grad_output, output]
        if not self._has_layout:
            as_output = [None if x is None else readable.rows(x.contiguous(), self._unit) for x in as_output]
        return as_output[0], *others[:-1], as_output[1], others[-1]

    def _plan_backward(self, a: Arguments, of: tuple[bool, ...]) -> _Backward:
        of_weights, _, mask_grad, columns_grad, slopes_grad = of
        query, key, value = a[:3]
        N, L, H, _ = query.shape
        S, H_kv = key.shape[1:3]

        def launcher(
            kernel: Any, programs: int, tiling: Launch, call: Call = self._call, by_keys: bool = False
        ) -> Launcher:
            tile = tile_of(a, tiling)._replace(BY_KEYS=by_keys, PRECISION=self._precision)
            tile = with_weights(tile, a) if of_weights else tile
            return Launcher(kernel, programs, tiling, call, tile, Given)

        tiling = self._tiling.grad_query
        all_blocks = preparation.blocks_of_queries(a, tiling.BLOCK_M)
        grad_query = launcher(kernels_of_backward.grad_query, H * all_blocks, tiling)
        grad_mask = of_mask = None
        if mask_grad and self._mask_sizes is not None:
            batches, heads = self._mask_sizes
            programs = batches * heads * blocks(L, tiling.BLOCK_M) * blocks(S, tiling.BLOCK_N)
            call = self._call._replace(mask_batches=batches, mask_heads=heads)
            grad_mask = launcher(kernels_of_backward.grad_mask, programs, tiling, call)
            of_mask = self._maker((batches, heads, L, S), torch.float32)
        tiling = self._tiling.grad_key_value
        programs = H_kv * preparation.blocks_of_keys(a, tiling.BLOCK_N)
        biases = () if a.bias_k is None else (key, value)
        of_blocks = self._maker((N, H, all_blocks // N), torch.float32)
        batch, terms = N, blocks(L, MOST_ROWS.value)
        if preparation.is_packed(a):  # of each sequence and what is behind them
            batch = preparation.sequences_of(a) + 1
            terms = blocks(L + batch * TERMS_UNIT.value, MOST_ROWS.value) + 1
        return _Backward(
            grad_query,
            grad_mask,
            launcher(kernels_of_backward.grad_key_value, programs, tiling, by_keys=True),
            tuple(self._maker(tuple(x.shape), x.dtype) for x in (query, key, value)),
            of_mask,
            self._maker((N, H, S), torch.float32) if columns_grad else None,
            tuple(self._maker((batch, H_kv, x.shape[3]), torch.float32) for x in biases),
            None if a.sinks is None else of_blocks,
            of_blocks if a.alibi_slopes is not None and slopes_grad else None,
            self._maker((N, H, 3, terms * MOST_ROWS.value), torch.float32),
            None if not preparation.may_hide_queries(a) else self._output,
        )

    def _readable(self, tensors: Tensors) -> Arguments:
        return readable.arguments(Arguments.of(tensors, self._numbers))

    def _given(self, tensors: Tensors) -> Tensors:
        """The first fields of `Call`; the mask is searched, if that pays."""
        if not self._is_readable:
            tensors = self._readable(tensors)[:TENSORS]
        query, key, value, mask, padding, *others = tensors
        squares = None
        if self._search is not None:
            launcher, maker = self._search
            squares = maker()
            launcher((query, key, value, mask, padding, squares, *others), (squares,))
        return query, key, value, mask, padding, squares, *others

    def _maker(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Maker:
        """What makes an uninitialised tensor, a contiguous one without strides.

        That of Inductor's programs takes half of `torch.empty`'s time.
        """
        if strides is None:
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        if self._index is None or _empty_strided is None:
            return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=self._device)
        return functools.partial(_empty_strided, shape, strides, dtype)


_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_strided: Any = getattr(_guards, "_empty_strided_cuda", None)  # not public


def _flash_serves(a: Arguments) -> bool:
    """Whether torch's flash kernel, the faster one, computes the forward of a call whose weights come after it."""
    if any(x is not None for x in a[3:TENSORS]) or a.softcap is not None:
        return False
    if a.add_zero_attn or a.first_visible is not None or not a.scale > 0:
        return False
    batch, length, heads, size = a.query.shape
    is_plain = a.last_visible is None or (a.last_visible == 0 and a.key.shape[1] == length)
    if batch * heads * length * a.key.shape[1] < LEAST_SCORES_OF_FLASH:
        return False
    return (
        (is_plain and length > 1 and a.key.shape[2] == heads and batch * heads <= MOST_HEADS_OF_TORCH)
        and (a.value.shape[3] == size and size % 8 == 0 and size <= LARGEST_OF_FLASH)
        and (a.query.dtype in (torch.float16, torch.bfloat16) and _has_flash(a.query.device))
    )


def _flash_forward(tensors: Tensors, is_causal: bool, scale: float, output: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and statistics; with the log-sum-exp for the maximum, all sums are 1."""
    heads = (x.transpose(1, 2) for x in tensors[:3] if x is not None)
    found, lse, *_ = _flash_attention(*heads, 0.0, is_causal, False, scale=scale)
    output.copy_(found.transpose(1, 2))
    lse = lse.contiguous()
    return lse, torch.stack((lse / scale, torch.ones_like(lse)))


_flash_attention: Any = torch.ops.aten._scaled_dot_product_flash_attention


def _has_flash(device: torch.device) -> bool:
    return device.type == "cuda"

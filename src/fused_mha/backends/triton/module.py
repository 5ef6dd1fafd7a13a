"""Eager calls of a whole module on CUDA, without the dispatcher: `one_call` keeps a `Kept` for each kind of them.

torch multiplies; between its products are the kernels of `launch`. Heads are views of the projections, and gradients
of heads are written where those of the projections lie: nothing is copied from one layout to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fused_mha.backends.triton.finite import Finite
from fused_mha.backends.triton.launch import Plan
from fused_mha.backends.triton.preparation import Layout
from fused_mha.core.memory import memory_of, memory_of_each
from fused_mha.core.modes import autocast_is_on, is_recorded, may_skip_dispatcher
from fused_mha.ops import module_autograd
from fused_mha.ops.module import GRADIENTS, TENSORS, Call
from fused_mha.ops.schema import Arguments

_IN_WEIGHT, _QUERY_WEIGHT, _IN_BIAS = map(Call._fields.index, ("in_weight", "query_weight", "in_bias"))
_OUT_WEIGHT, _OUT_BIAS, _BIAS_K = map(Call._fields.index, ("out_weight", "out_bias", "bias_k"))
_PADDING = Call._fields.index("key_padding_mask")
_KEPT = 3  # projections, heads and statistics
_OF_OUTPUT = 1 << _OUT_WEIGHT | 1 << _OUT_BIAS  # gradients in which the attention has no part
Tensors = Sequence[Any]  # those of `Call`


class _Product(NamedTuple):
    """One product of the in-projection, by some blocks of E rows of the weight."""

    source: int  # of query, key and value
    first: int  # of the blocks
    blocks: int
    begin: int  # of its result, (rows, blocks * E), in the tensor of all projections
    rows: int
    is_of_keys: bool


class Kept:
    """All calls of the sizes, strides and so on of this one, and with its flags."""

    def __init__(self, call: Call) -> None:
        self.numbers = call[TENSORS:]
        (N, L, S, E), H = call.sizes(), call.num_heads
        lengths = (L, S, S)
        length_first = not call.batch_first and call.query.dim() == 3
        self._is_self, self._E, self.device_type = call.key is None, E, call.query.device.type
        counts = (3,) if self._is_self else (1, 2) if call.value is None else (1, 1, 1)
        self._products: list[_Product] = []
        self._views, strides = [], []  # of the projections in one tensor
        begin = first = 0
        for source, count in enumerate(counts):
            length, width = lengths[source], count * E
            self._products.append(_Product(source, first, count, begin, N * length, self._is_self or source > 0))
            of_rows = (width, N * width) if length_first else (length * width, width)
            for i in range(count):
                self._views.append(((N, length, H, E // H), (*of_rows, E // H, 1), begin + i * E))
                strides.append(of_rows)
            begin, first = begin + N * length * width, first + count
        self._size = begin
        self._heads_shape, self._rows_shape = (N, L, H, E // H), (N * L, E)
        self._layout = Layout((E, N * E) if length_first else (L * E, E), *strides)
        self._weights_shape = call.weights_shape()
        self._weights_of_batch = self._weights_shape if call.query.dim() == 3 else (1, *self._weights_shape)
        self._finite = [Finite((N, n, x.shape[-1]), length_first) for n, x in zip(lengths, call.inputs(), strict=True)]
        self._plans: dict[object, Plan] = {}
        self._plan_of_forward: Plan | None = None
        self._saved: tuple[object, ...] | None = None  # what `_described` says of what a backward is given

    def __call__(self, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        """Output and weights or None."""
        output, weights, *_ = _record(*tensors, self) if is_recorded(*tensors[:GRADIENTS]) else self.forward(tensors)
        return output, weights

    def forward(self, tensors: Tensors) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """What the operator `multi_head_attention` returns, None for no weights, and all that its gradient takes."""
        query, in_bias, out_weight = tensors[0], tensors[_IN_BIAS], tensors[_OUT_WEIGHT]
        if self._is_self:
            projections = _multiply(self._rows(tensors, self._products[0]), tensors[_IN_WEIGHT], in_bias)
        else:
            projections = query.new_empty((self._size,))
            for product in self._products:
                bias = None if in_bias is None else self._blocks(in_bias, product)
                rows, result = self._rows(tensors, product), _result(projections, product, self._E)
                _multiply(rows, self._weight(tensors, product), bias, result)
        attention = self._attention_tensors(tensors, projections)
        if self._plan_of_forward is None:
            self._plan_of_forward = self._plan(attention)
        heads, weights, _, stats = self._plan_of_forward.forward(attention)
        # No view: the caller may change it in place.
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        _multiply(self._merged(heads), out_weight, tensors[_OUT_BIAS], output.view(self._rows_shape))
        if weights is not None and weights.shape != self._weights_shape:
            weights = weights.view(self._weights_shape).clone()
        if self._saved is None:
            self._saved = _described(projections, heads, stats, tensors)
        return output, weights, projections, heads, stats

    def backward(
        self,
        grad_output: Tensor | None,
        grad_weights: Tensor | None,
        projections: Tensor,
        heads: Tensor,
        stats: Tensor,
        *rest: Any,
    ) -> tuple[Tensor | None, ...] | None:
        """What the operator `multi_head_attention_backward` returns, with None for empty tensors.

        None where a hook has changed what was saved.
        """
        tensors, wanted = rest[:TENSORS], rest[-1]
        needs_attention = bool(wanted & ~_OF_OUTPUT)
        read = None if needs_attention else _KEPT  # of what is described: the others may be placeholders
        saved = _described(projections, heads, stats, tensors)
        if saved is None or self._saved is None or saved[:read] != self._saved[:read]:
            return None
        found: list[Tensor | None] = [None] * GRADIENTS
        grad_rows, out_weight = None, tensors[_OUT_WEIGHT]
        if grad_output is not None:
            grad_rows = grad_output.reshape(-1, self._E)
            if wanted >> _OUT_BIAS & 1:  # first: torch warns of a product that is the first work of a thread
                found[_OUT_BIAS] = grad_rows.sum(0)
            if wanted >> _OUT_WEIGHT & 1:
                found[_OUT_WEIGHT] = torch.mm(grad_rows.t(), self._merged(heads))
        if not needs_attention:
            return tuple(found)
        if grad_rows is None:
            grad_heads = torch.zeros_like(heads)
        else:
            grad_heads = torch.mm(grad_rows, out_weight).as_strided(heads.shape, heads.stride())
        if grad_weights is not None:
            grad_weights = grad_weights.reshape(self._weights_of_batch)
        grads, attention = projections.new_empty((self._size,)), self._attention_tensors(tensors, projections)
        of_attention = self._plan(attention).gradients(
            attention, (grad_heads, grad_weights, None), heads, stats, False, False, self._heads_of(grads)
        )
        for i, of_bias in enumerate(of_attention[5:7], _BIAS_K):
            if wanted >> i & 1:
                found[i] = of_bias.sum(0).to(grads.dtype).view(1, 1, self._E)
        self._add_gradients_of_projections(found, wanted, tensors, grads)
        return tuple(found)

    def _add_gradients_of_projections(
        self, found: list[Tensor | None], wanted: int, tensors: Tensors, grads: Tensor
    ) -> None:
        E, in_weight = self._E, tensors[_IN_WEIGHT]
        for i, shape in ((_IN_WEIGHT, (3 * E, E)), (_IN_BIAS, (3 * E,))):
            if wanted >> i & 1:
                found[i] = grads.new_empty(shape)
        of_weight, of_bias = found[_IN_WEIGHT], found[_IN_BIAS]
        for product in self._products:
            grad = _result(grads, product, E)
            if of_weight is not None:
                torch.mm(grad.t(), self._rows(tensors, product), out=self._blocks(of_weight, product))
            elif in_weight is None and wanted >> (i := _QUERY_WEIGHT + product.source) & 1:
                found[i] = torch.mm(grad.t(), self._rows(tensors, product))
            if of_bias is not None:
                torch.sum(grad, 0, out=self._blocks(of_bias, product))
            if wanted >> product.source & 1:
                of_rows = torch.mm(grad, self._weight(tensors, product))
                found[product.source] = of_rows.view(tensors[product.source].shape)

    def _rows(self, tensors: Tensors, product: _Product) -> Tensor:
        """The rows of a product's input; what the padding hides of keys is finite."""
        x, padding = tensors[product.source], tensors[_PADDING]
        if padding is not None and product.is_of_keys:
            x = self._finite[product.source](x, padding)
        return x.reshape(product.rows, x.shape[-1])

    def _weight(self, tensors: Tensors, product: _Product) -> Tensor:
        in_weight = tensors[_IN_WEIGHT]
        if in_weight is None:
            return tensors[_QUERY_WEIGHT + product.source]
        return self._blocks(in_weight, product)

    def _blocks(self, x: Tensor, product: _Product) -> Tensor:
        """Those of a packed weight or bias that a product takes."""
        return x if self._is_self else x.narrow(0, product.first * self._E, product.blocks * self._E)

    def _heads_of(self, projections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (projections.as_strided(*view) for view in self._views)
        return query, key, value

    def _merged(self, heads: Tensor) -> Tensor:
        """(rows, E), in the order of the caller's layout."""
        return heads.as_strided(self._rows_shape, (self._E, 1))

    def _attention_tensors(self, tensors: Tensors, projections: Tensor) -> tuple[Any, ...]:
        """The tensors of the operator `attention`."""
        bias_k, bias_v, attn_mask, padding, seed, *offsets = tensors[_BIAS_K:TENSORS]
        if padding is not None and padding.dim() == 1:
            padding = padding.unsqueeze(0)
        if bias_k is not None:
            bias_k, bias_v = (x.view(self._heads_shape[2:]) for x in (bias_k, bias_v))
        no_options = (None, None)  # sinks and slopes
        return *self._heads_of(projections), attn_mask, padding, bias_k, bias_v, seed, *no_options, *offsets

    def _plan(self, attention: tuple[Any, ...]) -> Plan:
        """For masks that lie as these; a backward is given copies."""
        masks = tuple(None if x is None else memory_of(x) for x in attention[3:5])
        plan = self._plans.get(masks)
        if plan is None:
            _, _, is_causal, add_zero_attn, dropout_p, scale, need_weights, average = self.numbers
            band = (None, 0 if is_causal else None, False)
            numbers = (*band, add_zero_attn, dropout_p, scale, None, need_weights, average)
            plan = self._plans[masks] = Plan(Arguments.of(attention, numbers), self._layout)
        return plan


def _result(x: Tensor, product: _Product, E: int) -> Tensor:
    """That of a product in a tensor of all projections."""
    width = product.blocks * E
    return x.as_strided((product.rows, width), (width, 1), product.begin)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor | None = None) -> Tensor:
    """``rows`` times the transposed weight, plus the bias."""
    if result is None:
        return functional.linear(rows, weight, bias)
    if bias is None:
        return torch.mm(rows, weight.t(), out=result)
    return torch.addmm(bias, rows, weight.t(), out=result)


def _described(projections: Tensor, heads: Tensor, stats: Tensor, tensors: Tensors) -> tuple[object, ...] | None:
    """What kernels go by of what a backward is given; None if one of them is no plain tensor."""
    others = (*tensors[:_IN_WEIGHT], *tensors[_BIAS_K:TENSORS])
    memory = memory_of_each((projections, heads, stats, *others), projections.device.type)
    if memory is None:
        return None
    kept, (*inputs, bias_k, bias_v, attn_mask, padding, seed, _, _) = memory[:_KEPT], memory[_KEPT:]
    of_any_layout = (None if x is None else (x[0], *x[2:4]) for x in (*inputs, attn_mask, padding))
    return *kept, bias_k, bias_v, seed, *of_any_layout


def _no_kernel(*_: Any) -> None:
    """For gradients that a mode or a class of tensors has to see: by differentiable operators."""


class _Module(torch.autograd.Function):
    """The operator `multi_head_attention` and its gradient without the dispatcher; its last argument is the `Kept`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.kept = inputs
        results = ctx.kept.forward(tensors)
        module_autograd.setup(ctx, (*tensors, *ctx.kept.numbers, True), results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        device = ctx.kept.device_type
        if autocast_is_on(device):  # of whoever calls `backward`: the forward's products were not cast
            with torch.autocast(device, enabled=False):
                return _Module.backward(ctx, *grads)
        kernel = ctx.kept.backward if may_skip_dispatcher(grads[:2]) else _no_kernel
        return module_autograd.backward(ctx, *grads, kernel=kernel)[: TENSORS + 1]


# Without what `Function.apply` does for transforms: of those, there is none here.
_base: Any = super(torch.autograd.Function, _Module)
_record = _base.apply

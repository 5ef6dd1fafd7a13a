"""The gradients of a whole module: by calls of the C++ library or of the operators, or as functions to differentiate.

`one_call` records its calls with these.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fused_mha.backends import cpu, native
from fused_mha.module_call import Call, Tensors, ranges, split
from fused_mha.ops import schema
from fused_mha.ops.schema import Arguments


class Operators:
    """What `gradients` calls of the library, by the operators: for who transforms or traces the backward alone."""

    @staticmethod
    def product(
        left: Tensor, right: Tensor, bias: None, left_is_transposed: bool, right_is_transposed: bool, output: Tensor
    ) -> Tensor:
        """As `native.Library.product`."""
        matrices = (x.reshape(-1, x.shape[-1]) for x in (left, right))
        result = torch.ops.fused_mha.product(*matrices, bias, left_is_transposed, right_is_transposed)
        return output.copy_(result.view(output.shape))

    @staticmethod
    def backward(
        arguments: Arguments,
        output: Tensor,
        stats: Tensor,
        grad_output: Tensor,
        grad_weights: Tensor | None,
        grad_lse: None,
        grad_attn_mask: None,
        grad_columns: None,
        grads: Iterable[Tensor],
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `native.Library.backward`."""
        found = schema.attention_backward(grad_output, grad_weights, grad_lse, output, stats, False, False, *arguments)
        for grad, result in zip(grads, found, strict=False):
            grad.copy_(result)
        return (None, None) if arguments.bias_k is None else (found[5].unsqueeze(0), found[6].unsqueeze(0))


def gradients(
    library: native.Library | Operators,
    call: Call,
    t: Tensors,
    needs: Tensors,
    grad_output: Tensor | None,
    grad_weights: Tensor | None,
    heads: Tensor,
    stats: Tensor,
    *products: Tensor,
) -> dict[str, Tensor]:
    """The gradients that are needed, by name."""
    multiply, layout, grads = library.product, call.layout, dict[str, Tensor]()
    N, L, H, _ = heads.shape
    E = t.out_weight.shape[0]
    merged = heads.view(N, L, E)
    if grad_output is None:
        grad_merged = torch.zeros_like(merged)
    else:
        grad = cpu.last_contiguous(layout.sequences(grad_output))
        grad_merged = multiply(grad, t.out_weight, None, False, False, torch.empty_like(merged))
        if needs.out_weight:
            grads["out_weight"] = multiply(grad, merged, None, True, False, torch.empty_like(t.out_weight))
        if needs.out_bias:
            grads["out_bias"] = grad.sum((0, 1))
    if not needs.reach_heads():
        return grads
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
    grad_products = [torch.empty_like(x) for x in products]
    arguments = Arguments.of(split(products, E, H), t.settings(call))
    of_biases = library.backward(
        arguments,
        heads,
        stats,
        grad_merged.view(heads.shape),
        grad_weights,
        None,
        None,
        None,
        split(grad_products, E, H),
    )
    for name, grad in zip(("bias_k", "bias_v"), of_biases, strict=True):
        if getattr(needs, name) and grad is not None:
            grads[name] = cpu.sum_over_batch(grad).to(heads.dtype).view(1, 1, E)
    for (first, end), grad in zip(ranges(call, t), grad_products, strict=True):
        name, x = t._fields[first], layout.sequences(t.inputs[first])
        weight_name = f"{name}_weight" if t.in_weight is None else "in_weight"
        rows = slice(None) if t.in_weight is None else slice(first * E, end * E)
        if needs[first] or needs[end - 1]:
            weight = getattr(t, weight_name)[rows]
            grads[name] = layout.new(grad, *x.shape)
            multiply(grad, weight, None, False, False, layout.sequences(grads[name]))
        if getattr(needs, weight_name):
            if weight_name not in grads:
                grads[weight_name] = torch.empty_like(getattr(t, weight_name))
            multiply(grad, cpu.last_contiguous(x), None, True, False, grads[weight_name][rows])
    if needs.in_bias:
        grads["in_bias"] = torch.cat([grad.sum((0, 1)) for grad in grad_products])
    return grads


def differentiable_gradients(
    call: Call, t: Tensors, needs: Tensors, grad_output: Tensor | None, grad_weights: Tensor | None
) -> dict[str, Tensor]:
    """The same as functions of everything, for a second derivative."""
    t = Tensors.of(x.view_as(x) if x is not None and x.requires_grad else x for x in t)
    results = zip(_forward_by_operators(call, t), (grad_output, grad_weights), strict=True)
    wanted = [(y, g) for y, g in results if g is not None]
    repeated = {t._fields[i] for first, end in ranges(call, t) for i in range(first + 1, end)}
    names = [name for name, needed in zip(t._fields, needs, strict=True) if needed and name not in repeated]
    found = torch.autograd.grad(
        [y for y, _ in wanted],
        [getattr(t, name) for name in names],
        [g for _, g in wanted],
        allow_unused=True,
        create_graph=True,
    )
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def _forward_by_operators(call: Call, t: Tensors) -> tuple[Tensor, Tensor]:
    E = t.out_weight.shape[0]
    weights = t.in_weights() if t.in_weight is None else t.in_weight.chunk(3)
    biases = (None,) * 3 if t.in_bias is None else t.in_bias.chunk(3)
    inputs = [t.inputs[first] for first, end in ranges(call, t) for _ in range(first, end)]
    projected = []
    for x, weight, bias in zip(map(call.layout.sequences, inputs), weights, biases, strict=True):
        rows = cpu.product(x.reshape(-1, x.shape[2]), weight, bias, False, True)
        projected.append(rows.view(*x.shape[:2], call.num_heads, -1))
    heads, attention_weights, _, _ = schema.attention(*projected, *t.settings(call))
    output = cpu.product(heads.reshape(-1, E), t.out_weight, t.out_bias, False, True).view(*heads.shape[:2], E)
    return call.layout.given(output), attention_weights

"""The whole forward of a module in one call of the C++ library: projections and attention.

`MultiHeadAttention.forward` asks here first. What this does not serve (compilers and transforms, hooks, replaced
projections, gradients of masks, NaN in hidden keys) goes through `projections` and `dispatch`, with the same results.
`explain` asks for the reason.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from fused_mha import dispatch, linear, masks, module_gradients, projections
from fused_mha.backends import cpu
from fused_mha.modes import autocast_is_on, is_eager
from fused_mha.module_call import Call, Layout, Tensors, ranges, split

_IN_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
_IN_PARAMETERS, _OUT_PARAMETERS = frozenset(_IN_NAMES), frozenset(("weight", "bias"))


def _parameters(module: nn.MultiheadAttention) -> tuple[Any, ...] | None:
    """The parameters in the order of `Tensors`; None where anything of them is hooked, replaced or of another shape.

    They are taken from where `nn.Module` keeps them: pruning, parametrizations and adapters keep theirs elsewhere.
    """
    own, out_proj, E = module._parameters, module._modules.get("out_proj"), module.embed_dim
    if not isinstance(out_proj, nn.Linear) or not projections.is_stock(out_proj):
        return None
    of_out = out_proj._parameters
    # A parametrization, a buffer or a plain attribute may stand in a parameter's place, also in that of a bias.
    for names, parameters, others in (
        (_IN_PARAMETERS, own, module.__dict__),
        (_OUT_PARAMETERS, of_out, out_proj.__dict__),
    ):
        if not names <= parameters.keys() or not names.isdisjoint(others):
            return None
    found = (*map(own.__getitem__, _IN_NAMES), of_out["weight"], of_out["bias"], module.bias_k, module.bias_v)
    virtual = (1, 1, E)
    shapes = ((3 * E, E), (E, E), (E, module.kdim), (E, module.vdim), (3 * E,), (E, E), (E,), virtual, virtual)
    for x, shape in zip(found, shapes, strict=True):
        if x is not None and (type(x) is not Parameter or x.shape != shape or not x.is_contiguous()):
            return None
    is_packed, is_separate = found[0] is not None, all(x is not None for x in found[1:4])
    has_both_biases_or_none = (found[7] is None) == (found[8] is None)
    return found if is_packed != is_separate and has_both_biases_or_none else None


def forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None] | None:
    """What `MultiHeadAttention.forward` returns for arguments that it has checked; None where this does not serve."""
    found = tensors_of(module, query, key, value, key_padding_mask, attn_mask)
    if isinstance(found, str):
        return None
    tensors, shared_inputs = found
    call = Call(
        Layout(query.dim() == 3, module.batch_first),
        shared_inputs,
        module.num_heads,
        is_causal,
        module.add_zero_attn,
        float(dropout_p),
        need_weights,
        average_attn_weights,
    )
    if dropout_p:
        tensors = tensors._replace(seed=cpu.draw_seed(dropout_p, query.device))
    output, weights = _Module.apply(call, *tensors) if cpu.is_recorded(*tensors) else _compute(call, tensors)
    return output, weights if weights is None or call.layout.is_batched else weights.squeeze(0)


def tensors_of(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> tuple[Tensors, int] | str:
    """What a call works on, cast under autocast, and `Call.shared_inputs`; or why one call cannot serve it."""
    if not dispatch.allows(cpu.BACKEND) or cpu.LIBRARY is None:
        return "the back end is not cpu"
    if not is_eager():
        return "a compiler, a tracer, a transform or a dispatch mode is active"
    parameters = _parameters(module)
    if parameters is None:
        return "a projection is hooked, replaced, reparametrized, sharded or incomplete"
    if module.embed_dim % module.num_heads or 0 in (query.numel(), key.numel(), value.numel()):
        return "an input is empty, or num_heads does not divide embed_dim"
    inputs = (query, key, value)
    shared = 1 if value is not key else 3 if key is query else 2
    if autocast_is_on("cpu"):
        if any(x is not None and x.dtype == torch.float64 for x in (*inputs, *parameters)):
            return "autocast leaves float64 as it is"
        dtype = torch.get_autocast_dtype("cpu")
        query = query.to(dtype)
        key = query if shared == 3 else key.to(dtype)
        inputs = (query, key, value.to(dtype) if shared == 1 else key)
        parameters = tuple(None if x is None else x.to(dtype) for x in parameters)
    dtype = query.dtype
    if dtype not in linear.dtypes():
        return linear.RULE
    for x in (*inputs, *parameters):
        if x is not None and (x.dtype != dtype or type(x) not in linear.PLAIN_TYPES or not x.is_cpu or x.is_neg()):
            return "an input or a parameter is of another dtype or device, or a subclass of torch.Tensor"
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and (
            type(mask) is not Tensor or mask.requires_grad or mask.is_neg() or mask.dtype not in _MASK_DTYPES
        ):
            return (
                "a mask needs a gradient, or is a subclass of torch.Tensor or of a dtype that the back end cannot read"
            )
    is_batched = query.dim() == 3
    if key_padding_mask is not None:
        if not all(map(_is_finite, inputs[1:] if shared == 1 else inputs[1:2])):
            return "a key that key_padding_mask hides may be NaN or infinite"
        key_padding_mask = key_padding_mask if is_batched else key_padding_mask.unsqueeze(0)
    if attn_mask is not None:
        N = 1 if not is_batched else query.shape[0 if module.batch_first else 1]
        attn_mask = cpu.last_contiguous(masks.per_head(attn_mask, N, module.num_heads))
    return Tensors.of((*inputs, *parameters, attn_mask, key_padding_mask, None)), shared


_MASK_DTYPES = (torch.bool, *cpu.DTYPES)


def _is_finite(x: Tensor) -> bool:
    """Whether all of ``x`` is; a sum of finite numbers that overflows is taken for none."""
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)))


def _compute(call: Call, t: Tensors, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor | None]:
    """The output in the caller's layout, and the weights (N, ...)."""
    assert cpu.LIBRARY is not None
    inputs = [cpu.last_contiguous(call.layout.sequences(x)) for x in t.inputs[: 4 - call.shared_inputs]]
    N, L, E = inputs[0].shape
    output = call.layout.new(inputs[0], N, L, E)
    weights = cpu.LIBRARY.module(
        inputs,
        t.in_weights(),
        t.in_bias,
        t.out_weight,
        t.out_bias,
        call.num_heads,
        t.settings(call),
        call.layout.sequences(output),
        kept,
    )
    return output, weights


class _Module(torch.autograd.Function):
    """A call whose gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t = Tensors.of(tensors)
        query = call.layout.sequences(t.query)
        N, L, E = query.shape
        S = call.layout.sequences(t.key).shape[1]
        products = [query.new_empty((N, L if first == 0 else S, (end - first) * E)) for first, end in ranges(call, t)]
        heads = query.new_empty((N, L, call.num_heads, E // call.num_heads))
        accumulator = torch.promote_types(query.dtype, torch.float32)
        stats = query.new_empty((2, N, call.num_heads, L), dtype=accumulator)
        output, weights = _compute(call, t, (*split(products, E, call.num_heads), heads, stats))
        ctx.call = call
        if weights is not None and not Tensors.of(ctx.needs_input_grad[1:]).reach_heads():
            ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, heads, stats, *products)
        return output, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_output, grad_weights = grads
        saved = ctx.saved_tensors  # which may be unpacked once only
        t, kept = Tensors.of(saved[: len(Tensors._fields)]), saved[len(Tensors._fields) :]
        needs = Tensors.of(ctx.needs_input_grad[1:])
        if grad_output is grad_weights is None:
            return (None,) * (1 + len(t))
        if torch.is_grad_enabled():
            found = module_gradients.differentiable_gradients(ctx.call, t, needs, grad_output, grad_weights)
        else:
            library = cpu.LIBRARY if cpu.LIBRARY is not None and is_eager() else module_gradients.Operators()
            found = module_gradients.gradients(library, ctx.call, t, needs, grad_output, grad_weights, *kept)
        return None, *(found.get(name) for name in t._fields)

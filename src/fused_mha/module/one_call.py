"""The whole forward of a module in one: projections and attention, by one operator on the CPU, and by what `plans`
keeps of eager calls on CUDA.

`MultiHeadAttention.forward` asks here first. What this does not serve (transforms, hooks, replaced projections,
gradients of masks, NaN in hidden keys) goes through `projections` and `dispatch`, with the same results. `explain` asks
for the reason.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from fused_mha.backends import cpu
from fused_mha.backends.arguments import draw_seed
from fused_mha.backends.capability import ServedModule
from fused_mha.core import dispatch, masks, plans
from fused_mha.core.inputs import AttentionInputs, default_scale
from fused_mha.core.memory import PLAIN_TYPES
from fused_mha.core.modes import autocast_is_on, is_eager, is_recorded, is_traced_by_dynamo
from fused_mha.core.packing import pack
from fused_mha.module import linear, projections
from fused_mha.module.arguments import ModuleArguments
from fused_mha.ops.module import TENSORS, Call

_IN_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
_OUT_NAMES = ("weight", "bias")
Offsets = tuple[Tensor, Tensor]  # `cu_seqlens` of packed sequences


def found_parameters(module: nn.MultiheadAttention) -> tuple[Any, ...] | None:
    """The parameters in the order of `ops.module.Call`; None where one is hooked or replaced.

    They are taken from where `nn.Module` keeps them: pruning, parametrizations and adapters keep theirs elsewhere.
    """
    own, out_proj = module._parameters, module._modules.get("out_proj")
    if not isinstance(out_proj, nn.Linear) or not projections.is_stock(out_proj):
        return None
    of_out = out_proj._parameters
    # A parametrization, a buffer or a plain attribute may stand in a parameter's place, also in that of a bias.
    for names, parameters, others in (
        (_IN_NAMES, own, module.__dict__),
        (_OUT_NAMES, of_out, out_proj.__dict__),
    ):
        for name in names:  # in torch 2.10 and 2.11, Dynamo cannot compare sets with dictionaries
            if name not in parameters or name in others:
                return None
    return (*map(own.__getitem__, _IN_NAMES), of_out["weight"], of_out["bias"], module.bias_k, module.bias_v)


def _parameters(module: nn.MultiheadAttention) -> tuple[Any, ...] | None:
    """The same; None too where one is of another shape, or not contiguous."""
    found, E = found_parameters(module), module.embed_dim
    if found is None:
        return None
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
    arguments: ModuleArguments,
    dropout_p: float,
    offsets: Offsets | None = None,
    small: Small | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """What `MultiHeadAttention.forward` returns for arguments that it has checked; None where this does not serve.

    The rows of packed sequences are unbatched input with their offsets. A small call is noted for the next.
    """
    tensors = tensors_of(module, arguments)
    if isinstance(tensors, str):
        return None
    packed = _without_padding(module, arguments, tensors)
    if packed is not None:
        tensors, offsets = packed
    seed, numbers = draw_seed(dropout_p, arguments.query.device), _numbers(module, arguments, dropout_p)
    output, weights, *_ = cpu.multi_head_attention((*tensors, seed, *(offsets or (None, None))), numbers)
    if small is not None and plans.is_constant(numbers):
        small.place.note(numbers)
    output = output if packed is None else output.view(arguments.query.shape)
    return output, weights if arguments.need_weights else None


class Small(NamedTuple):
    """A small call on the CPU, whose checks take as long as its kernels; not yet checked."""

    place: plans.Place
    arguments: ModuleArguments
    parameters: tuple[Any, ...]

    def serve(self) -> tuple[Tensor, Tensor | None] | None:
        """What `forward` returns, where a call that it served was the same but for values; else None."""
        numbers = self.place.find()
        if numbers is None:
            return None
        seed = draw_seed(numbers[_DROPOUT_P], self.arguments.query.device)
        tensors = _tensors_of_call(self.arguments, self.parameters, numbers, seed)
        output, weights, *_ = cpu.multi_head_attention(tensors, numbers)
        return output, weights if self.arguments.need_weights else None


def small(module: nn.MultiheadAttention, arguments: ModuleArguments) -> Small | None:
    """Such a call, or None. Padding has values that decide what serves it."""
    query, key, value, padding, need_weights, attn_mask, average_attn_weights, is_causal = arguments
    if torch.compiler.is_compiling() or not query.is_cpu or padding is not None or autocast_is_on("cpu"):
        return None
    if query.numel() > _MOST_OF_SMALL or key.numel() > _MOST_OF_SMALL or cpu.LIBRARY is None:
        return None
    parameters = found_parameters(module)
    if parameters is None or type(module.num_heads) is not int:  # 4.0 is equal to 4, and refused
        return None
    flags = (module.batch_first, module.num_heads, is_causal, module.add_zero_attn, need_weights, average_attn_weights)
    sizes = (module.embed_dim, module.kdim, module.vdim)
    dropout_p = module.dropout if module.training else 0.0
    tensors, is_one = _shared_left_out(query, key, value, parameters)
    place = plans.place_of((*tensors, attn_mask), (*flags, *sizes, *is_one, dropout_p, cpu.LIBRARY.isa))
    return None if place is None else Small(place, arguments, parameters)


_MOST_OF_SMALL = 1 << 14  # elements of an input, from which on the checks are less than a twentieth of a call


def _without_padding(
    module: nn.MultiheadAttention, arguments: ModuleArguments, tensors: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor | None, ...], Offsets] | None:
    """The same call with its keys as packed rows, which it then projects without the hidden ones; None where that does
    not pay, or where padding is not at the right of every sequence.

    All queries are there, in as many sequences. The output has the same bits. Products of few rows, a sequence of few
    keys, or one with virtual keys behind it, would be summed in another order.
    """
    (query, key, value), padding = tensors[:3], arguments.key_padding_mask
    if padding is None or padding.dtype != torch.bool or padding.dim() != 2 or not module.batch_first or not is_eager():
        return None
    (N, S), E = padding.shape, module.embed_dim
    if arguments.need_weights or arguments.attn_mask is not None or N * S * E * E < _LEAST_WORK:
        return None
    if module.bias_k is not None or module.add_zero_attn:
        return None
    lengths = S - padding.sum(dim=1)
    least, keys = (int(x) for x in torch.stack((lengths.min(), lengths.sum())).tolist())
    if least < _FEWEST_KEYS or not _FEWEST_ROWS <= keys <= (1 - _LEAST_HIDDEN) * N * S:
        return None
    if query is None or not torch.equal(padding, torch.arange(S, device=padding.device) >= lengths.unsqueeze(1)):
        return None
    of_keys, cu_seqlens_k = pack(query if key is None else key, padding)
    of_values = None if value is None else of_keys if value is key else pack(value, padding)[0]
    L = query.shape[1]
    cu_seqlens_q = torch.arange(0, N * L + 1, L, device=padding.device)
    return (query.flatten(0, 1), of_keys, of_values, *tensors[3:-1], None), (cu_seqlens_q, cu_seqlens_k)


# Measured by `benchmarks/run.py ragged` and on one thread: packed rows take 0.75 to 0.95 of the time from here on.
_LEAST_HIDDEN = 0.3  # of all keys
_LEAST_WORK = 1 << 26  # multiply-adds of a projection, which the padding is a part of
_FEWEST_KEYS = 9  # of a sequence: `csrc/generic/few_keys.h` has fewer
_FEWEST_ROWS = 64  # of a product: `csrc/generic/few_rows.h` has fewer


def _numbers(module: nn.MultiheadAttention, arguments: ModuleArguments, dropout_p: float) -> tuple[Any, ...]:
    """Those of `ops.module.Call`."""
    return (
        module.batch_first,
        module.num_heads,
        arguments.is_causal,
        module.add_zero_attn,
        float(dropout_p),
        default_scale(module.embed_dim // module.num_heads),
        arguments.need_weights,
        arguments.average_attn_weights,
    )


def tensors_of(module: nn.MultiheadAttention, arguments: ModuleArguments) -> tuple[Tensor | None, ...] | str:
    """The tensors of `ops.module.Call` before the seed, cast under autocast; or why one call cannot serve."""
    query, key, value, key_padding_mask, _, attn_mask, _, _ = arguments
    if not dispatch.allows(cpu.BACKEND) or cpu.LIBRARY is None:
        return "the back end is not cpu"
    if not query.is_cpu:
        return "the query is not on the CPU"
    eager = is_eager()
    if not eager and not is_traced_by_dynamo():
        return "a tracer, a transform or a dispatch mode is active"
    parameters = _parameters(module)
    if parameters is None:
        return "a projection is hooked, replaced, reparametrized, sharded or incomplete"
    if module.embed_dim % module.num_heads or 0 in (query.numel(), key.numel(), value.numel()):
        return "an input is empty, or num_heads does not divide embed_dim"
    casts = autocast_is_on("cpu")
    dtype = torch.get_autocast_dtype("cpu") if casts else query.dtype
    if not linear.serves(dtype, module.embed_dim, query, key):
        return linear.RULE
    rounds = False  # weights of float32 to bfloat16 as they are read
    if casts:
        if any(x is not None and x.dtype == torch.float64 for x in (query, key, value, *parameters)):
            return "autocast leaves float64 as it is"
        cast_query = query.to(dtype)
        cast_key = cast_query if key is query else key.to(dtype)
        query, key, value = cast_query, cast_key, cast_key if value is key else value.to(dtype)
        rounds = eager and dtype == torch.bfloat16 and not is_recorded(query, key, value, *parameters)
        parameters = tuple(None if x is None else x if rounds and _is_weight(x) else x.to(dtype) for x in parameters)
    if key_padding_mask is not None and not eager:
        hidden = masks.hidden_keys(key_padding_mask).unsqueeze(-1)
        if query.dim() == 3 and not module.batch_first:
            hidden = hidden.transpose(0, 1)
        query, key, value = projections.without_hidden_keys(query, key, value, hidden)
    inputs = (query, key, value)
    if value is key and parameters[0] is not None:  # one packed weight, and so one product
        inputs = (query, None if key is query else key, None)
    is_readable = _is_readable if eager else _is_on_cpu
    for x in (*inputs, *parameters):
        if x is None or (x.dtype == dtype and type(x) in PLAIN_TYPES and is_readable(x)):
            continue
        if not (rounds and _is_weight(x) and is_readable(x)):
            return "an input or a parameter is of another dtype or device, or a subclass of torch.Tensor"
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and (
            type(mask) is not Tensor or mask.requires_grad or not is_readable(mask) or mask.dtype not in _MASK_DTYPES
        ):
            return (
                "a mask needs a gradient, or is a subclass of torch.Tensor or of a dtype that the back end cannot read"
            )
    if key_padding_mask is not None and eager and not (_is_finite(key) and (value is key or _is_finite(value))):
        return "a key that key_padding_mask hides may be NaN or infinite"
    if attn_mask is not None:
        attn_mask = masks.per_head(attn_mask, _batch_size(query, module.batch_first), module.num_heads)
    return *inputs, *parameters, attn_mask, key_padding_mask


_MASK_DTYPES = (torch.bool, *cpu.DTYPES)


class Kept(NamedTuple):
    """A call on CUDA, and what serves calls of its kind; `served` is None where the general way has to find out."""

    kind: plans.Kind
    served: ServedModule | None
    arguments: ModuleArguments
    parameters: tuple[Any, ...]
    numbers: tuple[Any, ...]  # of `ops.module.Call`

    def tensors(self, seed: Tensor | None = None) -> tuple[Any, ...]:
        """Those of `ops.module.Call`; what `served` is given has a seed if there is dropout."""
        return _tensors_of_call(self.arguments, self.parameters, self.numbers, seed)


def _tensors_of_call(
    arguments: ModuleArguments, parameters: tuple[Any, ...], numbers: tuple[Any, ...], seed: Tensor | None
) -> tuple[Any, ...]:
    """Those of `ops.module.Call`, of a call that was checked or is like one that was."""
    query, key, value, padding, _, attn_mask, _, _ = arguments
    batch_first, num_heads, *_ = numbers
    if value is key and parameters[0] is not None:  # one packed weight, and so one product
        key, value = None if key is query else key, None
    if attn_mask is not None:
        attn_mask = masks.per_head(attn_mask, _batch_size(query, batch_first), num_heads)
    return query, key, value, *parameters, attn_mask, padding, seed, None, None


def kept(module: nn.MultiheadAttention, arguments: ModuleArguments) -> Kept | None:
    """An eager call on CUDA whose kind `plans` may know, not yet checked; None where the steps have to be taken, as for
    a kind of which `keep` has found that nothing serves it.
    """
    device = arguments.query.device.type
    if device != plans.DEVICE or torch.compiler.is_compiling() or autocast_is_on(device):
        return None
    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal = arguments
    parameters = found_parameters(module)
    if parameters is None:
        return None
    num_heads, dropout_p = module.num_heads, module.dropout if module.training else 0.0
    flags = (
        module.batch_first,
        num_heads,
        is_causal,
        module.add_zero_attn,
        dropout_p,
        need_weights,
        average_attn_weights,
    )
    sizes = (module.embed_dim, module.kdim, module.vdim)
    learning, is_one = _shared_left_out(query, key, value, parameters)
    tensors = (*learning, attn_mask, key_padding_mask)
    kind, served = plans.find(tensors, (*flags, *sizes, *is_one, is_recorded(*learning)), len(learning))
    if kind is None or served is _BY_STEPS or type(num_heads) is not int:
        return None
    return Kept(kind, served, arguments, parameters, _numbers(module, arguments, dropout_p))


def _shared_left_out(
    query: Tensor, key: Tensor, value: Tensor, parameters: tuple[Any, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[bool, bool]]:
    """The tensors of a call, None for a key that is the query and a value that is the key, and whether they are."""
    is_self, is_shared = key is query, value is key
    return (query, None if is_self else key, None if is_shared else value, *parameters), (is_self, is_shared)


def serve(call: Kept, served: ServedModule) -> tuple[Tensor, Tensor | None]:
    """What `MultiHeadAttention.forward` returns."""
    return served(call.tensors(draw_seed(call.numbers[_DROPOUT_P], call.arguments.query.device)))


_DROPOUT_P = Call._fields.index("dropout_p") - TENSORS


def keep(call: Kept, module: nn.MultiheadAttention, inputs: AttentionInputs) -> ServedModule | None:
    """What serves this call, which was checked, and the later ones of its kind; None if they take the steps."""
    served = _found_for(call, module, inputs)
    plans.remember(call.kind, _BY_STEPS if served is None else served)
    return served


_BY_STEPS = object()  # kept of a kind, so that its inputs are projected to find that out once


def _found_for(call: Kept, module: nn.MultiheadAttention, inputs: AttentionInputs) -> ServedModule | None:
    parameters, dtype = _parameters(module), inputs.query.dtype
    if parameters is None or any(x is not None and x.dtype != dtype for x in (*call.arguments[:3], *parameters)):
        return None
    if not plans.is_constant(call.numbers):
        return None
    back_end = dispatch.choose(inputs)
    return back_end.serves_module(Call.of((*call.tensors(), *call.numbers)))


def _batch_size(query: Tensor, batch_first: bool) -> int:
    return 1 if query.dim() == 2 else query.shape[0 if batch_first else 1]


def _is_weight(x: Tensor) -> bool:
    return x.dim() == 2 and x.dtype == torch.float32 and type(x) in PLAIN_TYPES


def _is_on_cpu(x: Tensor) -> bool:
    return x.is_cpu


def _is_readable(x: Tensor) -> bool:
    return x.is_cpu and not x.is_neg()  # which tracers cannot ask; there the dispatcher sees to it


def _is_finite(x: Tensor) -> bool:
    """Whether all of ``x`` is; a sum of finite numbers that overflows is taken for none."""
    return math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)))

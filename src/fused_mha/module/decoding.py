"""A call with a cache: one token of each batch element by the CPU library's kernels, any other by `steps`.

`MultiHeadAttention.forward` calls it. The kernels of one token take less time than the checks that `steps` makes before
each of them; here one look at the call stands for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from fused_mha.backends import cpu
from fused_mha.core import dispatch
from fused_mha.core.memory import PLAIN_TYPES
from fused_mha.core.modes import autocast_is_on, is_eager
from fused_mha.module import linear, one_call, steps
from fused_mha.module.arguments import ModuleArguments
from fused_mha.module.cache import KeyValueCache

if TYPE_CHECKING:
    from fused_mha.module.multi_head_attention import MultiHeadAttention


def forward(
    module: MultiHeadAttention, arguments: ModuleArguments, positions: Tensor | None, cache: KeyValueCache
) -> tuple[Tensor, Tensor | None]:
    """What `MultiHeadAttention.forward` returns for a call with a cache."""
    projections = _projections(module, arguments, cache) if positions is None else None
    if projections is None:
        return steps.with_options(module, arguments, positions, cache)
    weight, bias, out_weight, out_bias, (of_query, of_key, of_value), (D, D_v) = projections
    x = arguments.query
    tokens = x.reshape(-1, module.embed_dim)  # (N, E), in either layout
    packed = cpu.product(tokens, weight, bias, False, True)
    N, row = packed.shape
    query = packed.as_strided((N, 1, of_query // D, D), (row, row, D, 1))
    key = packed.as_strided((N, 1, of_key // D, D), (row, row, D, 1), of_query)
    value = packed.as_strided((N, 1, of_value // D_v, D_v), (row, row, D_v, 1), of_query + of_key)
    projected = steps.Projected(query, key, value, tokens, None)
    inputs, extended = steps.beside_cache(module, arguments, None, cache, projected, N, True, 0.0)
    assert extended is not None
    heads = cpu.BACKEND.run(inputs).output
    merged = steps.gated(module, heads.view(N, -1), tokens)
    output = cpu.product(merged, out_weight, out_bias, False, True).view(x.shape)
    cache.commit(module, extended)
    return output, None


class _Projections(NamedTuple):
    """The parameters of a module whose products are the library's, rows of the first, and sizes of heads."""

    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    rows: tuple[int, int, int]
    sizes: tuple[int, int]  # D, D_v


def _projections(module: MultiHeadAttention, arguments: ModuleArguments, cache: KeyValueCache) -> _Projections | None:
    """Those of a call that the kernels serve as it is; None where the steps have to be taken, or an error is due."""
    x, key, value, padding, need_weights, attn_mask, _, _ = arguments
    if key is not x or value is not x or padding is not None or attn_mask is not None or need_weights:
        return None
    E, options, shape = module.embed_dim, module.options, x.shape
    is_token = len(shape) == 2 or (len(shape) == 3 and shape[1 if module.batch_first else 0] == 1)
    if not is_token or (len(shape) == 2 and shape[0] != 1) or shape[-1] != E or shape.numel() == 0:
        return None
    if torch.is_grad_enabled() or not is_eager() or autocast_is_on("cpu") or (module.training and module.dropout):
        return None
    if dispatch.forced() not in (None, cpu.BACKEND.name) or cpu.LIBRARY is None or type(cache) is not KeyValueCache:
        return None
    dtype = x.dtype
    if type(module.num_heads) is not int or type(x) not in PLAIN_TYPES or not x.is_cpu or x.is_neg():
        return None
    if not linear.serves(dtype, E, x):
        return None
    found = one_call.found_parameters(module)
    if found is None or found[0] is None:
        return None
    weight, bias, out_weight, out_bias = found[0], found[4], found[5], found[6]
    D = E // module.num_heads if options is None else options.head_dim
    D_v = D if options is None else options.value_head_dim
    rows = (E, E, E) if options is None else options.rows()
    if weight.shape != (sum(rows), E) or out_weight.shape != (E, module.num_heads * D_v):
        return None
    for p in (weight, out_weight, bias, out_bias):
        if p is not None and (type(p) is not Parameter or p.dtype != dtype or not p.is_cpu or p.is_neg()):
            return None
    return _Projections(weight, bias, out_weight, out_bias, rows, (D, D_v))

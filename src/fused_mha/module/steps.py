"""The forward of a module step by step: project, transform heads, attend, gate, project out.

`MultiHeadAttention.forward` takes these steps where `one_call` does not serve; `explain` those before the attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_mha.core import masks, plans
from fused_mha.core.heads import Rotation
from fused_mha.core.inputs import (
    AttentionInputs,
    AttentionResult,
    ModuleArguments,
    check_module_attn_mask,
    check_same_device,
    default_scale,
)
from fused_mha.module import options as module_options
from fused_mha.module import projections
from fused_mha.module.cache import Extended, KeyValueCache
from fused_mha.module.heads import transform_heads
from fused_mha.module.linear import linear

if TYPE_CHECKING:
    from fused_mha.module.multi_head_attention import MultiHeadAttention
    from fused_mha.module.options import ModuleOptions


class Projected(NamedTuple):
    """Query, key and value of a call in heads, and what else the later steps need."""

    query: Tensor  # (N, L, H, D)
    key: Tensor  # (N, S, H_kv, D)
    value: Tensor  # (N, S, H_kv, D_v)
    embedded: Tensor  # the query as given, with finite numbers where it is a hidden key too
    key_padding_mask: Tensor | None  # (N, S)


def project(module: MultiHeadAttention, arguments: ModuleArguments, is_batched: bool) -> Projected:
    """Project and split into heads what has been checked."""
    query, key, value, key_padding_mask, *_ = arguments
    packed_weight, options = module.in_proj_weight, module.options
    # Not the attribute: torch too follows a num_heads that is changed later.
    head_dim = module.embed_dim // module.num_heads if options is None else options.head_dim
    value_head_dim = head_dim if options is None else options.value_head_dim
    rows = None if options is None else options.rows
    if key_padding_mask is not None:
        hidden = masks.hidden_keys(key_padding_mask).unsqueeze(-1)
        if not is_batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not module.batch_first:
            hidden = hidden.transpose(0, 1)
        query, key, value = projections.without_hidden_keys(query, key, value, hidden)
    if packed_weight is not None:
        q, k, v = projections.packed_in_projection(query, key, value, packed_weight, module.in_proj_bias, rows)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        q, k, v = projections.separate_in_projection(query, key, value, *weights, module.in_proj_bias)
    q, k = (projections.split_heads(x, head_dim, module.batch_first) for x in (q, k))
    v = projections.split_heads(v, value_head_dim, module.batch_first)
    return Projected(q, k, v, query, key_padding_mask)


def attention_inputs(
    module: MultiHeadAttention, arguments: ModuleArguments, N: int, projected: Projected, dropout_p: float
) -> AttentionInputs:
    """What the core is given: heads as they were projected, masks and virtual keys as the core takes them."""
    query, key, value, _, key_padding_mask = projected
    attn_mask = arguments.attn_mask
    if attn_mask is not None:
        attn_mask = masks.per_head(attn_mask, N, module.num_heads)
    bias_k, bias_v = module.bias_k, module.bias_v
    if bias_k is not None and bias_v is not None:
        bias_k = bias_k.to(key.dtype).view(-1, key.shape[3])
        bias_v = bias_v.to(key.dtype).view(-1, value.shape[3])
    elif bias_k is not None or bias_v is not None:
        raise AssertionError("bias_k and bias_v must both be tensors or both None; got one of them alone")
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=arguments.is_causal,
        causal_alignment="top_left",
        window=None,
        bias_k=bias_k,
        bias_v=bias_v,
        sinks=None,
        alibi_slopes=None,
        add_zero_attn=module.add_zero_attn,
        dropout_p=dropout_p,
        scale=default_scale(query.shape[3]),
        softcap=None,
        need_weights=arguments.need_weights,
        average_attn_weights=arguments.average_attn_weights,
        return_lse=False,
    )


def finish(
    module: MultiHeadAttention, inputs: AttentionInputs, embedded: Tensor, is_batched: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend, gate and project out: what `MultiHeadAttention.forward` returns."""
    return leave(module, plans.run(inputs), embedded, is_batched)


def leave(
    module: MultiHeadAttention, attended: AttentionResult, embedded: Tensor, is_batched: bool
) -> tuple[Tensor, Tensor | None]:
    """Gate and project out what the core gave."""
    heads, weights, _ = attended
    merged = projections.merge_heads(heads, is_batched, module.batch_first)
    if module.options is not None and module.gate_proj_weight is not None:
        merged = torch.sigmoid(linear(embedded, module.gate_proj_weight, module.gate_proj_bias)) * merged
    output = projections.out_projection(merged, module.out_proj)
    if weights is not None and not is_batched:
        weights = weights.squeeze(0)
    return output, weights


class Prepared(NamedTuple):
    """A call up to the attention, by a module with options or with a cache."""

    inputs: AttentionInputs
    embedded: Tensor
    is_batched: bool
    extended: Extended | None


def with_options(
    module: MultiHeadAttention, arguments: ModuleArguments, positions: Tensor | None, cache: KeyValueCache | None
) -> tuple[Tensor, Tensor | None]:
    """What `MultiHeadAttention.forward` returns, of a module with options or for a call with a cache."""
    prepared = prepare(module, arguments, positions, cache)
    result = finish(module, prepared.inputs, prepared.embedded, prepared.is_batched)
    if cache is not None and prepared.extended is not None:
        cache.commit(module, prepared.extended)
    return result


def prepare(
    module: MultiHeadAttention, arguments: ModuleArguments, positions: Tensor | None, cache: KeyValueCache | None
) -> Prepared:
    """Check such a call, and compute what the core is given."""
    options = module.options
    given_mask = arguments.attn_mask
    if cache is not None:
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache must be a fused_mha.KeyValueCache; got {type(cache).__name__}")
        arguments = arguments._replace(attn_mask=None)  # of which the cache's keys have columns
    N, is_batched, dropout_p = module._checked(arguments)
    rope = None if options is None else options.rope
    if rope is None and positions is not None:
        raise ValueError("positions are for rope=RotaryEmbedding(...), which this module does not have; got positions")
    if rope is not None and arguments.key.shape != arguments.query.shape:  # hooks and transforms give views and copies
        raise ValueError(
            "rope counts the positions of query and key as one, in self-attention: key must have query's shape, "
            f"{tuple(arguments.query.shape)}; got {tuple(arguments.key.shape)}"
        )
    projected = project(module, arguments, is_batched)
    if cache is not None:
        cache.check(module, projected.key, projected.value, projected.key_padding_mask, arguments.need_weights)
    if options is not None:
        rotation = _rotation(options, projected.query, positions, cache, is_batched)
        of_query, of_key = module_options.norms(module, options)
        projected = projected._replace(
            query=transform_heads(projected.query, of_query, rotation),
            key=transform_heads(projected.key, of_key, rotation),
        )
    extended = None
    if cache is not None:
        extended = cache.extended(projected.key, projected.value, projected.key_padding_mask)
        projected = projected._replace(key=extended.key, value=extended.value, key_padding_mask=extended.hidden)
        mask = _of_all_keys(given_mask, module.num_heads, projected, cache.length + extended.new, is_batched)
        arguments = arguments._replace(attn_mask=mask)
    inputs = attention_inputs(module, arguments, N, projected, dropout_p)
    if options is not None:
        slopes = options.alibi_slopes
        slopes = None if slopes is None else module_options.slopes_for(slopes, projected.query)
        inputs = inputs._replace(
            window=options.window, softcap=options.softcap, sinks=module.sinks, alibi_slopes=slopes
        )
    if cache is not None:
        inputs = inputs._replace(causal_alignment="bottom_right")
    return Prepared(inputs, projected.embedded, is_batched, extended)


def _of_all_keys(
    attn_mask: Tensor | None, num_heads: int, projected: Projected, length: int, is_batched: bool
) -> Tensor | None:
    """Of a mask with columns for all tokens so far, those of the keys that are kept."""
    if attn_mask is None:
        return None
    N, L = projected.query.shape[:2]
    check_same_device(projected.query, (("attn_mask", attn_mask),))
    check_module_attn_mask(attn_mask, N, num_heads, L, length, is_batched)
    return attn_mask[..., length - projected.key.shape[1] :]


def _rotation(
    options: ModuleOptions, query: Tensor, positions: Tensor | None, cache: KeyValueCache | None, is_batched: bool
) -> Rotation | None:
    rope = options.rope
    if rope is None:
        return None
    N, L = query.shape[:2]
    if positions is None:
        positions = None if cache is None else cache.positions(L)
        if positions is None:
            return rope.counted(0 if cache is None else cache.length, query)
        return rope.at(positions, query)
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        kind = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be a tensor of an integer dtype; got {kind}")
    if positions.shape != (L,) and not (is_batched and positions.shape == (N, L)):
        shapes = f"(L) = {(L,)}" + (f" or (N, L) = {(N, L)}" if is_batched else "")
        raise ValueError(f"positions must have shape {shapes}; got {tuple(positions.shape)}")
    if positions.device != query.device:
        raise RuntimeError(f"positions must be on query's device, {query.device}; got {positions.device}")
    return rope.at(positions, query)

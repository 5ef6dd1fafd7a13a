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
    CausalAlignment,
    check_same_device,
    checked_weights_of_heads,
    default_scale,
)
from fused_mha.module import options as module_options
from fused_mha.module import projections
from fused_mha.module.arguments import ModuleArguments, check_module_attn_mask
from fused_mha.module.cache import Extended, KeyValueCache
from fused_mha.module.heads import transform_heads
from fused_mha.module.linear import linear
from fused_mha.module.one_call import Offsets
from fused_mha.module.rotary import check_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    rows = None if options is None else options.rows()
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
    module: MultiHeadAttention,
    arguments: ModuleArguments,
    N: int,
    projected: Projected,
    dropout_p: float,
    causal_alignment: CausalAlignment = "top_left",
) -> AttentionInputs:
    """What the core is given: heads as they were projected, masks and virtual keys as the core takes them."""
    query, key, value, _, key_padding_mask = projected
    attn_mask, options = arguments.attn_mask, module.options
    if attn_mask is not None:
        attn_mask = masks.per_head(attn_mask, N, module.num_heads)
    bias_k, bias_v = module.bias_k, module.bias_v
    if bias_k is not None and bias_v is not None:
        bias_k = bias_k.to(key.dtype).view(-1, key.shape[3])
        bias_v = bias_v.to(key.dtype).view(-1, value.shape[3])
    elif bias_k is not None or bias_v is not None:
        raise AssertionError("bias_k and bias_v must both be tensors or both None; got one of them alone")
    slopes = None if options is None else options.alibi_slopes
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=arguments.is_causal,
        causal_alignment=causal_alignment,
        window=None if options is None else options.window,
        bias_k=bias_k,
        bias_v=bias_v,
        sinks=None if options is None else module.sinks,
        alibi_slopes=None if slopes is None else module_options.slopes_for(slopes, query),
        add_zero_attn=module.add_zero_attn,
        dropout_p=dropout_p,
        scale=default_scale(query.shape[3]),
        softcap=None if options is None else options.softcap,
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
    merged = gated(module, projections.merge_heads(heads, is_batched, module.batch_first), embedded)
    output = projections.out_projection(merged, module.out_proj)
    if weights is not None and not is_batched:
        weights = weights.squeeze(0)
    return output, weights


def gated(module: MultiHeadAttention, merged: Tensor, embedded: Tensor) -> Tensor:
    """The merged heads, (..., H * D_v), times the gate of the query, (..., E), where the module has one."""
    if module.options is None or module.gate_proj_weight is None:
        return merged
    return torch.sigmoid(linear(embedded, module.gate_proj_weight, module.gate_proj_bias)) * merged


class Prepared(NamedTuple):
    """A call up to the attention, of a module with options or with what torch's forward has not."""

    inputs: AttentionInputs
    embedded: Tensor
    is_batched: bool
    extended: Extended | None


def with_options(
    module: MultiHeadAttention,
    arguments: ModuleArguments,
    positions: Tensor | None = None,
    cache: KeyValueCache | None = None,
    weights_of_heads: Sequence[int] | None = None,
    offsets: Offsets | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `MultiHeadAttention.forward` returns: of a module with options, or for a call with what torch's has not."""
    prepared = prepare(module, arguments, positions, cache, weights_of_heads, offsets)
    result = finish(module, prepared.inputs, prepared.embedded, prepared.is_batched)
    if cache is not None and prepared.extended is not None:
        cache.commit(module, prepared.extended)
    return result


def prepare(
    module: MultiHeadAttention,
    arguments: ModuleArguments,
    positions: Tensor | None = None,
    cache: KeyValueCache | None = None,
    weights_of_heads: Sequence[int] | None = None,
    offsets: Offsets | None = None,
) -> Prepared:
    """Check such a call, and compute what the core is given."""
    options = module.options
    given_mask = arguments.attn_mask
    if cache is not None:
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache must be a fused_mha.KeyValueCache; got {type(cache).__name__}")
        arguments = arguments._replace(attn_mask=None)  # of which the cache's keys have columns
    N, is_batched, dropout_p = module._checked(arguments)
    heads = None
    if weights_of_heads is not None:
        averages = arguments.need_weights and arguments.average_attn_weights
        heads = checked_weights_of_heads(weights_of_heads, module.num_heads, averages)
        arguments = arguments._replace(need_weights=True, average_attn_weights=False)
    rope = None if options is None else options.rope
    if rope is None and positions is not None:
        raise ValueError("positions are for rope=RotaryEmbedding(...), which this module does not have; got positions")
    if rope is not None and arguments.key.shape != arguments.query.shape:  # hooks and transforms give views and copies
        raise ValueError(
            "rope counts the positions of query and key as one, in self-attention: key must have query's shape, "
            f"{tuple(arguments.query.shape)}; got {tuple(arguments.key.shape)}"
        )
    projected = project(module, arguments, is_batched)
    if rope is not None and offsets is not None:
        positions = _positions_in_sequences(offsets, projected.query.shape[1])
    arguments = arguments._replace(attn_mask=given_mask)
    inputs, extended = beside_cache(module, arguments, positions, cache, projected, N, is_batched, dropout_p)
    inputs = inputs._replace(weights_of_heads=heads)
    if offsets is not None:
        inputs = inputs._replace(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])
    return Prepared(inputs, projected.embedded, is_batched, extended)


def beside_cache(
    module: MultiHeadAttention,
    arguments: ModuleArguments,
    positions: Tensor | None,
    cache: KeyValueCache | None,
    projected: Projected,
    N: int,
    is_batched: bool,
    dropout_p: float,
) -> tuple[AttentionInputs, Extended | None]:
    """Transform heads as they were projected, and put them behind those of the cache, if there is one."""
    options = module.options
    if cache is not None:
        cache.check(module, projected.key, projected.value, projected.key_padding_mask, arguments.need_weights)
    if options is not None:
        rotation = _rotation(options, projected.query, positions, cache, is_batched)
        of_query, of_key = module_options.norms(module, options)
        projected = projected._replace(
            query=transform_heads(projected.query, of_query, rotation),
            key=transform_heads(projected.key, of_key, rotation),
        )
    if cache is None:
        return attention_inputs(module, arguments, N, projected, dropout_p), None
    extended = cache.extended(projected.key, projected.value, projected.key_padding_mask)
    projected = projected._replace(key=extended.key, value=extended.value, key_padding_mask=extended.hidden)
    if arguments.attn_mask is not None:
        length = cache.length + extended.new
        mask = _of_all_keys(arguments.attn_mask, module.num_heads, projected, length, is_batched)
        arguments = arguments._replace(attn_mask=mask)
    return attention_inputs(module, arguments, N, projected, dropout_p, "bottom_right"), extended


def _positions_in_sequences(offsets: Offsets, tokens: int) -> Tensor:
    """Of each row of packed sequences, which both queries and keys have the offsets of."""
    begins, of_keys = offsets
    if begins is not of_keys and not torch.equal(begins, of_keys):
        raise ValueError("rope counts the positions of query and key as one: key must have query's lengths")
    places = torch.arange(tokens, device=begins.device)
    return places - begins[torch.searchsorted(begins, places, right=True) - 1]


def _of_all_keys(attn_mask: Tensor, num_heads: int, projected: Projected, length: int, is_batched: bool) -> Tensor:
    """Of a mask with columns for all tokens so far, those of the keys that are kept."""
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
    if positions is None:
        positions = None if cache is None else cache.positions(query.shape[1])
        if positions is None:
            return rope.counted(0 if cache is None else cache.length, query)
        return rope.at(positions, query)
    check_positions(positions, query, is_batched)
    return rope.at(positions, query)

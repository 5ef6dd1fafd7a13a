"""`explain`: which back end would serve a call of a module, and why; users call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_mha.backends import delegation
from fused_mha.core.dispatch import Explanation, explain_inputs
from fused_mha.integrations import sdpa
from fused_mha.module import linear, nested, one_call, steps
from fused_mha.module.arguments import ModuleArguments
from fused_mha.module.cache import KeyValueCache
from fused_mha.module.multi_head_attention import MultiHeadAttention


def explain(
    module: MultiHeadAttention | Callable[..., Tensor],
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    **forward_arguments: Any,
) -> Explanation:
    """Which back end would serve ``module(query, key, value, **forward_arguments)``, and why not the others.

    Runs the module's checks and in-projections, but no attention and no hooks, and draws no random numbers.

    Args:
        module: a `MultiHeadAttention`, or `scaled_dot_product_attention`, ours or torch's as `serve_sdpa` would serve
            it.
        query: as for the module's forward.
        key: as for the module's forward; ``query`` if None.
        value: as for the module's forward; ``key`` if None.
        **forward_arguments: the others of the module's forward.

    Returns:
        An `Explanation`; `print` it.

    Raises:
        TypeError: ``module`` is neither, is spread over ranks, or has no such argument.

    Examples:
        >>> print(fused_mha.explain(fused_mha.MultiHeadAttention(16, 4), torch.randn(5, 2, 16)))
        back end: cpu (the first that can serve)
          note: instruction set avx512_bf16
          projections: in one call with the attention
          triton: cannot: it runs on cuda alone (query is on cpu)
          sdpa: cannot: it returns no attention weights (need_weights=True)
          reference: could serve
    """
    key = query if key is None else key
    if module in sdpa.FUNCTIONS:
        return sdpa.explain(query, key, key if value is None else value, **forward_arguments)
    if not isinstance(module, MultiHeadAttention):
        raise TypeError(
            "module must be a fused_mha.MultiHeadAttention or scaled_dot_product_attention; got "
            f"{type(module).__name__}"
        )
    if module.context is not None or hasattr(module, "shards"):  # by `parallel`
        raise TypeError("module must be of one process; got one whose sequence or heads are spread over ranks")
    call = inspect.signature(module.forward).bind(query, key, key if value is None else value, **forward_arguments)
    call.apply_defaults()
    positions, cache, heads = own = [call.arguments.pop(name) for name in ("positions", "cache", "weights_of_heads")]
    arguments = ModuleArguments(**call.arguments)
    offsets = None
    if any(x.is_nested for x in arguments[:3]):
        if nested.is_padded(module, arguments, arguments.need_weights or heads is not None):
            arguments, _ = nested.padded(module, arguments)
        else:
            packed = nested.packed(module, arguments)
            arguments, offsets = packed.arguments, (packed.cu_seqlens_q, packed.cu_seqlens_k)
    with torch.no_grad():  # autograd would refuse inputs of inference mode, which the module's forward copies
        if module.options is not None or offsets is not None or any(x is not None for x in own):
            inputs = steps.prepare(module, arguments, positions, cache, heads, offsets).inputs
            return explain_inputs(inputs)._replace(projections=_projections(module, arguments, cache, heads))
        N, is_batched, dropout_p = module._checked(arguments)
        projected = steps.project(module, arguments, is_batched)
        inputs = steps.attention_inputs(module, arguments, N, projected, dropout_p)
    explanation = explain_inputs(inputs)
    kept = one_call.kept(module, arguments)
    if kept is not None and explanation.chosen is not None and one_call.keep(kept, module, inputs) is not None:
        rule = delegation.MODULE_RULE
        by = str(rule) if explanation.chosen == rule.serves else "torch's products"
        return explanation._replace(projections=f"in one step with the attention, by {by}")
    return explanation._replace(projections=_projections(module, arguments))


def _projections(
    module: MultiHeadAttention,
    arguments: ModuleArguments,
    cache: KeyValueCache | None = None,
    weights_of_heads: Sequence[int] | None = None,
) -> str:
    """How `one_call` and `linear` decide, and why."""
    if cache is not None:
        reason = "one call serves no cache"
    elif module.options is not None:
        reason = f"one call serves no {module.options.described()}"
    elif weights_of_heads is not None:
        reason = "one call gives the weights of no head by name"
    else:
        reason = one_call.tensors_of(module, arguments)
    if not isinstance(reason, str):
        return "in one call with the attention"
    weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
    whose = "fused_mha's product" if linear.is_ours(arguments.query, weight, module.in_proj_bias) else "torch's linear"
    return f"by {whose}, apart from the attention: {reason}"

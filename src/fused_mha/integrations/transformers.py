"""`attn_implementation="fused_mha"` for the models of transformers, 4.48 and later: `register` and `cache`, for users.

transformers calls two functions of ours: `attention_mask` once a forward for each kind of mask, and `attention_forward`
in each layer. It is imported when `register` is called.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fused_mha.core.attention import attention
from fused_mha.integrations.lazy_mask import Band, LazyMask
from fused_mha.integrations.transformers_masks import attention_mask, masking_utils

OLDEST = "4.48"
OLDEST_WITH_LAYERS = "4.56"  # of caches

# What models hand through to their layers, and what no attention function of transformers computes with.
NOT_OF_ATTENTION = frozenset(
    {
        *("cache_position", "deterministic", "layer_idx", "logits_to_keep", "max_length_k", "max_length_q"),
        *("num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "return_dict"),
        *("seq_idx", "use_cache"),
    }
)


def register(name: str = "fused_mha") -> None:
    """Make ``attn_implementation="fused_mha"`` run a model of transformers on the fused core.

    Models that go through transformers' AttentionInterface are served, in training and generation: causal, windowed,
    padded and custom masks, grouped heads, softcap, sinks, position bias, dropout, and weights by
    ``output_attentions=True``. Logits and gradients are those of ``"eager"``, but for positions that see no key, as
    those of padding on the left: theirs is a zero. What the core can't compute raises a ValueError that names it.

    Args:
        name: what models call it by.

    Raises:
        ImportError: transformers is not installed, or older than 4.48.
        ValueError: the name is taken, or has "flash" or "sdpa" in it, by which transformers knows its own.

    Examples:
        >>> from fused_mha.integrations.transformers import register
        >>> register()
        >>> model = LlamaForCausalLM.from_pretrained(path, attn_implementation="fused_mha")

    Source:
        https://huggingface.co/docs/transformers/attention_interface
    """
    package = _transformers()
    modeling_utils = importlib.import_module("transformers.modeling_utils")
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("transformers.masking_utils")
    functions: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        raise ImportError(f"transformers must be {OLDEST} or later; got {package.__version__}")
    taken = name in functions and functions[name] is not attention_forward
    if taken or name == "eager" or any(own in name for own in ("flash", "flex", "sdpa", "paged", "|")):
        raise ValueError(f"name must be one that transformers has no meaning for, as 'fused_mha'; got {name!r}")
    if isinstance(functions, dict):  # before 4.50
        functions[name] = attention_forward
    else:
        functions.register(name, attention_forward)
    if (masking := masking_utils()) is not None:
        masking.AttentionMaskInterface.register(name, attention_mask)


def cache(config: Any) -> Any:
    """A cache for ``model.generate`` that writes new tokens where transformers' own copies all of them at each new one.

    It is a `DynamicCache`, or an `EncoderDecoderCache`, and can do what they can: beam search, cropping for assisted
    decoding, windows, padding. Results are those of transformers' own. Memory grows by doubling.

    Args:
        config: the model's, ``model.config``.

    Returns:
        An empty cache.

    Raises:
        ImportError: transformers is not installed, or older than 4.56.

    Examples:
        >>> from fused_mha.integrations import transformers as integration
        >>> integration.register()
        >>> model.generate(**inputs, past_key_values=integration.cache(model.config))

    Source:
        https://huggingface.co/docs/transformers/kv_cache
    """
    package = _transformers()
    if not hasattr(importlib.import_module("transformers.cache_utils"), "DynamicSlidingWindowLayer"):
        raise ImportError(f"a cache needs transformers {OLDEST_WITH_LAYERS} or later; got {package.__version__}")
    return importlib.import_module("fused_mha.integrations.transformers_cache").growing_cache(config)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "fused_mha.integrations.transformers needs transformers, which is not installed: "
            "pip install 'fused-mha[transformers]'"
        ) from error


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: what `eager` computes, on the fused core.

    Args:
        module: the layer; dropout is for its training alone.
        query: (N, H, L, D).
        key: (N, H_kv, S, D).
        value: (N, H_kv, S, D_v).
        attention_mask: what `attention_mask` has made, or a mask broadcastable to (N, H, L, S' >= S), bool (True =
            attend) or float (added to the scores).
        scaling: factor of the scores; 1 / sqrt(D) if None.
        dropout: probability of dropping a weight.
        is_causal: without a mask, whether it is causal; None is False.
        sliding_window: without a mask, how many keys a causal layer sees, its own the last; a mask says it already.
        softcap: c: a scaled score s becomes c * tanh(s / c), before the mask and the bias.
        s_aux: (H,), a sink's logit for each head.
        position_bias: broadcastable to (N, H, L, S), added to the scores.
        head_mask: H numbers, factors of the weights of a head.
        output_attentions: return the weights.
        **others: what does not concern attention. All other keywords are refused unless None or False.

    Returns:
        The output (N, L, H, D_v), and the weights (N, H, L, S), after dropout, or None.

    Raises:
        ValueError: a keyword that the core can't compute.
    """
    _, H, L, _ = query.shape
    _check_keywords(module, L, scaling, attention_mask, others)
    S = key.shape[2]
    is_lazy = type(attention_mask) is LazyMask
    hides = attention_mask.hides if is_lazy and attention_mask.shape[2:] == (L, S) else None
    masks: dict[str, Any] = {}
    if isinstance(hides, Band):
        left, right = hides.limits
        masks = {
            "key_padding_mask": hides.padding,
            "is_causal": right == 0,
            "causal_alignment": "bottom_right",
            "window": None if left is None and right in (None, 0) else hides.limits,
        }
        if hides.visible < S:
            key, value = key[:, :, : hides.visible], value[:, :, : hides.visible]
        attention_mask = None
    elif is_lazy:
        attention_mask = attention_mask.entries() if hides is None else hides
    elif attention_mask is None:
        masks = _without_a_mask(L, S, is_causal, sliding_window)
    elif attention_mask.dtype == torch.bool:
        attention_mask = attention_mask.logical_not()
    visible = key.shape[2]
    result = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=_added(attention_mask, position_bias, visible),
        sinks=s_aux,
        dropout_p=dropout if module.training else 0.0,
        scale=scaling,
        softcap=softcap,
        need_weights=bool(output_attentions) or _weights_are_captured(),
        average_attn_weights=False,
        **masks,
    )
    output, weights = result.output, result.weights
    if head_mask is not None:
        if head_mask.numel() != H:
            raise ValueError(
                f"head_mask must have one number for each of {H} heads; got shape {tuple(head_mask.shape)}"
            )
        factors = head_mask.reshape(H).to(output.dtype)
        output = output * factors.unsqueeze(-1)
        weights = None if weights is None else weights * factors.view(H, 1, 1)
    if weights is not None and visible < S:
        weights = torch.nn.functional.pad(weights, (0, S - visible))
    return output, weights


def _weights_are_captured() -> bool:
    """Whether a model takes the weights from its layers' results, as it may without a keyword; from 5.2 on."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector: Any = getattr(capturing, "_active_collector", None)  # there is no public name
    if collector is None or torch.compiler.is_compiling():  # Dynamo reads no context variable
        return False
    return any("attentions" in name for name in collector.get() or ())


def _check_keywords(
    module: nn.Module, L: int, scaling: float | None, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    """Raise ValueError for what would change the result and can't be computed."""
    for name, x in others.items():
        if name in NOT_OF_ATTENTION or x is None or x is False:
            continue
        if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            is_band = type(attention_mask) is LazyMask and isinstance(attention_mask.hides, Band)
            if x.numel() == 2 or not (attention_mask is None or is_band):
                continue  # one sequence, or a mask that tells them apart
            raise ValueError(
                f"{name} gives {x.numel() - 1} sequences, and the mask does not keep them apart: pass position_ids "
                "that start again with each sequence, and neither attention_mask nor a cache"
            )
        raise ValueError(f"{name} is a keyword of attention that fused_mha does not know; got {type(x).__name__}")
    is_causal = getattr(module, "is_causal", False) and not getattr(module, "is_cross_attention", False)
    if is_causal and attention_mask is not None and attention_mask.shape[-2] == 1 < L:
        # GPT-2's own eager, before transformers 4.53, hides the future besides.
        raise ValueError(
            f"attention_mask must have a row for each of the {L} queries of a causal layer; got shape "
            f"{tuple(attention_mask.shape)}"
        )
    if scaling is None:  # GPT-2 before transformers 5
        for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if getattr(module, name, usual) is not usual:
                raise ValueError(f"{name}={not usual} changes the scores, and this transformers gives no scaling")


def _without_a_mask(L: int, S: int, is_causal: bool | None, sliding_window: int | None) -> dict[str, Any]:
    """What a layer that gets no mask says of what it hides."""
    if is_causal and L > 1:
        return {"is_causal": True, "window": None if sliding_window is None else (sliding_window - 1, None)}
    if sliding_window is not None and L > 1 and sliding_window < S:
        raise ValueError(
            f"sliding_window={sliding_window} has no meaning without a mask for {L} queries and {S} keys of a layer "
            "that is not causal"
        )
    return {}


def _added(mask: Tensor | None, bias: Tensor | None, S: int) -> Tensor | None:
    """A mask (True = ignore) and a bias, each of any rank up to 4, as the attn_mask of `attention` over S keys."""
    if mask is not None:
        mask = _of_keys(mask, S)
    if bias is not None:
        bias = _of_keys(bias, S)
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _of_keys(mask: Tensor, S: int) -> Tensor:
    """The mask as (N|1, H|1, L|1, S): models make it longer than their cache."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] == 1:
        return mask.expand(*mask.shape[:-1], S)
    return mask[..., :S] if mask.shape[-1] > S else mask

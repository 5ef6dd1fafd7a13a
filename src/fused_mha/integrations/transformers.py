"""`attn_implementation="fused_mha"` for the models of transformers, 4.48 and later: `register`, which users call.

transformers calls two functions of ours: `attention_mask` once a forward for each kind of mask, and `attention_forward`
in each layer. It is imported when `register` is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_mha.core.attention import attention
from fused_mha.integrations.band_mask import BandMask
from fused_mha.integrations.transformers_masks import attention_mask, masking_utils

OLDEST = "4.48"

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
        >>> fused_mha.integrations.transformers.register()
        >>> model = LlamaForCausalLM.from_pretrained(path, attn_implementation="fused_mha")

    Source:
        https://huggingface.co/docs/transformers/attention_interface
    """
    try:
        from transformers import __version__, modeling_utils  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "fused_mha.integrations.transformers needs transformers, which is not installed: "
            "pip install 'fused-mha[transformers]'"
        ) from error
    functions: Any = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        raise ImportError(f"transformers must be {OLDEST} or later; got {__version__}")
    taken = name in functions and functions[name] is not attention_forward
    if taken or name == "eager" or any(own in name for own in ("flash", "flex", "sdpa", "paged", "|")):
        raise ValueError(f"name must be one that transformers has no meaning for, as 'fused_mha'; got {name!r}")
    if isinstance(functions, dict):  # before 4.50
        functions[name] = attention_forward
    else:
        functions.register(name, attention_forward)
    if (masking := masking_utils()) is not None:
        masking.AttentionMaskInterface.register(name, attention_mask)


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
        sliding_window: what `attention_mask` says already.
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
    _check_keywords(module, scaling, attention_mask, others)
    _, H, L, _ = query.shape
    S = key.shape[2]
    band: dict[str, Any] = {}
    dense = attention_mask
    visible = S
    if type(attention_mask) is BandMask:
        if attention_mask.is_band and attention_mask.shape[2:] == (L, S):
            dense, visible = None, attention_mask.visible
            left, right = attention_mask.band
            band = {
                "key_padding_mask": attention_mask.padding,
                "is_causal": right == 0,
                "causal_alignment": "bottom_right",
                "window": None if left is None and right in (None, 0) else (left, right),
            }
        else:
            dense = attention_mask.entries()
    elif attention_mask is None:
        if is_causal and L > 1:
            band = {"is_causal": True, "window": None if sliding_window is None else (sliding_window - 1, 0)}
        elif sliding_window is not None and S > sliding_window and L > 1:
            raise ValueError(
                f"sliding_window={sliding_window} without a mask must be of a causal layer; got {S} keys and is_causal="
                f"{is_causal}: which keys it hides is said by no argument"
            )
    if visible < S:
        key, value = key[:, :, :visible], value[:, :, :visible]
    result = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=_added(dense, position_bias, visible),
        sinks=s_aux,
        dropout_p=dropout if module.training else 0.0,
        scale=scaling,
        softcap=softcap,
        need_weights=bool(output_attentions),
        average_attn_weights=False,
        **band,
    )
    output, weights = result.output, result.weights
    if head_mask is not None:
        factors = head_mask.reshape(H).to(output.dtype)
        output = output * factors.unsqueeze(-1)
        weights = None if weights is None else weights * factors.view(H, 1, 1)
    if weights is not None and visible < S:
        weights = torch.nn.functional.pad(weights, (0, S - visible))
    return output, weights


def _check_keywords(
    module: nn.Module, scaling: float | None, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    """Raise ValueError for what would change the result and can't be computed."""
    for name, x in others.items():
        if name in NOT_OF_ATTENTION or x is None or x is False:
            continue
        if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if x.numel() == 2 or not (attention_mask is None or type(attention_mask) is BandMask):
                continue  # one sequence, or a mask that says which key is of which
            raise ValueError(
                f"{name} gives {x.numel() - 1} sequences, and the mask does not keep them apart: pass position_ids "
                "that start again with each sequence, and neither attention_mask nor a cache"
            )
        raise ValueError(f"{name} is a keyword of attention that fused_mha does not know; got {type(x).__name__}")
    if scaling is None:  # GPT-2 before transformers 5
        for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if getattr(module, name, usual) is not usual:
                raise ValueError(f"{name}={not usual} changes the scores, and this transformers gives no scaling")


def _added(mask: Tensor | None, bias: Tensor | None, S: int) -> Tensor | None:
    """A mask (True = attend) and a bias, each of any rank up to 4, as the attn_mask of `attention` over S keys."""
    if mask is not None:
        mask = _of_keys(mask, S)
        mask = mask.logical_not() if mask.dtype == torch.bool else mask
    if bias is None:
        return mask
    bias = _of_keys(bias, S)
    if mask is None:
        return bias
    return bias.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def _of_keys(mask: Tensor, S: int) -> Tensor:
    """The mask as (N|1, H|1, L|1, S): of a cache, models make it longer."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask[..., :S] if mask.shape[-1] > S else mask.expand(*mask.shape[:-1], S)

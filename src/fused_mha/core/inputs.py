"""What goes into the attention core and what comes out, and every shape, dtype and device error.

`attention` and `varlen_attention` check their arguments here, once, before anything is computed; `module.arguments` has
the checks of the module.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

CausalAlignment = Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]


class AttentionInputs(NamedTuple):
    """Checked arguments of one attention call, in the order of `reference.attention`.

    Shapes: N batch, H query heads, H_kv key/value heads, L query length, S key length, D head size.
    """

    query: Tensor  # (N, L, H, D)
    key: Tensor  # (N, S, H_kv, D)
    value: Tensor  # (N, S, H_kv, D_v)
    attn_mask: Tensor | None  # (N|1, H|1, L|1, S), bool (True = ignore) or float (added)
    key_padding_mask: Tensor | None  # (N, S), bool (True = ignore) or float (added)
    is_causal: bool
    causal_alignment: CausalAlignment
    window: Window | None
    bias_k: Tensor | None  # (H_kv, D)
    bias_v: Tensor | None  # (H_kv, D_v)
    sinks: Tensor | None  # (H), any floating dtype
    alibi_slopes: Tensor | None  # (H), any floating dtype
    add_zero_attn: bool
    dropout_p: float
    scale: float
    softcap: float | None
    need_weights: bool
    average_attn_weights: bool
    return_lse: bool
    weights_of_heads: tuple[int, ...] | None = None  # whose weights are returned alone, not averaged; all if None
    cu_seqlens_q: Tensor | None = None  # (sequences + 1), int64: the rows are those of packed sequences, N = 1
    cu_seqlens_k: Tensor | None = None

    def score_options(self) -> list[str]:
        """The names of the options in use that change scores otherwise than a mask does."""
        options = ("softcap", "sinks", "alibi_slopes")
        return [name for name in options if getattr(self, name) is not None]

    def needs_mask_tensor(self) -> bool:
        """Whether a core that knows no mask but "causal, top-left" needs one tensor that says the rest."""
        if self.attn_mask is not None or self.key_padding_mask is not None or self.window is not None:
            return True
        has_virtual_keys = self.bias_k is not None or self.add_zero_attn  # visible, causal or not
        L, S = self.query.shape[1], self.key.shape[1]
        are_numbers = type(L) is type(S) is int  # a guard on symbols would tie an exported program to what it finds
        is_aligned = self.causal_alignment == "top_left" or (are_numbers and L == S)
        return self.is_causal and (has_virtual_keys or not is_aligned)


class AttentionResult(NamedTuple):
    """What `attention` returns.

    `output` is (N, L, H, D_v); `weights` is (N, L, S'), or (N, H, L, S') per head, or (N, n, L, S') of n heads that
    were named, after dropout, with S' = S plus the virtual keys, or None; `lse` is (N, H, L), the natural logarithm of
    the sum of the exponentiated scores, or None.

    Examples:
        >>> query, key, value = (torch.randn(2, 5, 4, 8) for _ in range(3))
        >>> result = fused_mha.attention(query, key, value, return_lse=True)
        >>> result.output.shape, result.weights, result.lse.shape
        (torch.Size([2, 5, 4, 8]), None, torch.Size([2, 4, 5]))
    """

    output: Tensor
    weights: Tensor | None
    lse: Tensor | None


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The sizes, as texts of errors print them."""
    return tuple(tensor.shape)


def type_name(x: object) -> str:
    """The type with its module, but that of a builtin."""
    kind = type(x)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_mask_dtype(name: str, mask: Tensor, error: type[Exception]) -> None:
    """Raise ``error`` unless a mask is of a dtype that has a meaning."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise error(
            f"{name} must be of dtype bool (True = ignore) or floating point (added to the scores); got {mask.dtype}"
        )


def check_same_device(query: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    """Raise TypeError or RuntimeError, by name, unless the others are tensors on the device of the query, or None."""
    device = query.device
    for name, other in others:
        if other is None:
            continue
        if not isinstance(other, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type_name(other)}: torch.as_tensor makes one of an array")
        if other.device != device:
            raise RuntimeError(f"all tensors must be on query's device, {device}; got {name} on {other.device}")


def default_scale(head_dim: int) -> float:
    """1 / sqrt(D), the factor of the scores in equation 1 of "Attention Is All You Need"."""
    return 1.0 / math.sqrt(head_dim)


def check_dropout(dropout_p: float) -> None:
    """Raise ValueError unless ``0 <= dropout_p <= 1``, as `torch.nn.functional.dropout` does."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")


def check_window(window: object) -> None:
    """Raise ValueError unless it is None or two sides, each None or a count."""
    if window is None:
        return
    sides = window if isinstance(window, (tuple, list)) else ()
    if len(sides) != 2 or any(
        side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0) for side in sides
    ):
        raise ValueError(f"window must be (left, right), each None or a count of keys >= 0; got {window!r}")


def check_softcap(softcap: object) -> None:
    """Raise ValueError unless it is None or a positive number that is a normal one in fp32."""
    if softcap is None:
        return
    fp32 = torch.finfo(torch.float32)
    if isinstance(softcap, bool) or not (isinstance(softcap, (int, float)) and fp32.tiny <= softcap <= fp32.max):
        raise ValueError(f"softcap must be None or a positive, finite number of fp32's normal range; got {softcap!r}")


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    window: Window | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    return_lse: bool = False,
    weights_of_heads: Sequence[int] | None = None,
) -> AttentionInputs:
    """Check the arguments of `attention` and resolve its defaults; RuntimeError and ValueError as torch's SDPA."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested:
            raise RuntimeError(f"{name} must be a strided tensor; got a nested tensor")
        if tensor.dim() != 4:
            raise RuntimeError(f"{name} must be 4-D, (batch, length, heads, head size); got shape {shape_of(tensor)}")
        if not tensor.is_floating_point():
            raise RuntimeError(f"{name} must be of a floating dtype; got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise RuntimeError(f"{name} must have query's dtype, {query.dtype}; got {tensor.dtype}")
    N, L, H, D = query.shape
    S, H_kv, D_v = key.shape[1], key.shape[2], value.shape[3]
    if D == 0:
        raise RuntimeError(f"query must have a head size of at least 1; got shape {shape_of(query)}")
    if key.shape[0] != N or key.shape[3] != D:
        raise RuntimeError(
            f"key must have shape (N, S, H_kv, D) with query's N = {N} and D = {D}; got {shape_of(key)}, query is "
            f"{shape_of(query)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise RuntimeError(
            f"value must have shape (N, S, H_kv, D_v) with key's (N, S, H_kv) = {(N, S, H_kv)}; got {shape_of(value)}"
        )
    if H_kv == 0 or H % H_kv != 0:
        raise RuntimeError(f"query's heads must be a multiple of key's and value's; got H = {H} and H_kv = {H_kv}")
    check_same_device(
        query,
        (
            ("key", key),
            ("value", value),
            ("attn_mask", attn_mask),
            ("key_padding_mask", key_padding_mask),
            ("bias_k", bias_k),
            ("bias_v", bias_v),
            ("sinks", sinks),
            ("alibi_slopes", alibi_slopes),
        ),
    )
    if attn_mask is not None:
        check_mask_dtype("attn_mask", attn_mask, RuntimeError)
        given = attn_mask
        if given.dim() == 2:
            attn_mask = given[None, None]
        if attn_mask.dim() != 4 or not broadcasts(attn_mask, (N, H, L, S)):
            raise RuntimeError(
                f"attn_mask must have shape (L|1, S) or (N|1, H|1, L|1, S) with (N, H, L, S) = {(N, H, L, S)}; "
                f"got {shape_of(given)}{transposed_hint(given, L, S)}"
            )
    if key_padding_mask is not None:
        check_mask_dtype("key_padding_mask", key_padding_mask, RuntimeError)
        if key_padding_mask.shape != (N, S):
            raise RuntimeError(
                f"key_padding_mask must have shape (N, S) = {(N, S)}; got {shape_of(key_padding_mask)}"
                f"{transposed_hint(key_padding_mask, N, S)}"
            )
    if (bias_k is None) != (bias_v is None):
        given = "bias_v" if bias_k is None else "bias_k"
        raise RuntimeError(f"bias_k and bias_v must be given together; got {given} alone")
    for name, bias, shape in (("bias_k", bias_k, (H_kv, D)), ("bias_v", bias_v, (H_kv, D_v))):
        if bias is not None and (bias.shape != shape or bias.dtype != query.dtype):
            raise RuntimeError(
                f"{name} must have shape {shape} and dtype {query.dtype}; got {shape_of(bias)} and {bias.dtype}"
            )
    for name, of_heads in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if of_heads is not None and (of_heads.shape != (H,) or not of_heads.is_floating_point()):
            raise RuntimeError(
                f"{name} must have shape (H,) = ({H},) and a floating dtype; got {shape_of(of_heads)} and "
                f"{of_heads.dtype}"
            )
    check_softcap(softcap)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment must be 'top_left' or 'bottom_right'; got {causal_alignment!r}")
    check_window(window)
    check_dropout(dropout_p)
    if weights_of_heads is not None:
        weights_of_heads = checked_weights_of_heads(weights_of_heads, H, need_weights and average_attn_weights)
        need_weights, average_attn_weights = True, False
    return AttentionInputs(
        query,
        key,
        value,
        attn_mask,
        key_padding_mask,
        is_causal,
        causal_alignment,
        window,
        bias_k,
        bias_v,
        sinks,
        alibi_slopes,
        add_zero_attn,
        dropout_p,
        default_scale(D) if scale is None else scale,
        softcap,
        need_weights,
        average_attn_weights,
        return_lse,
        weights_of_heads,
    )


def checked_weights_of_heads(weights_of_heads: object, H: int, averages: bool) -> tuple[int, ...]:
    """The heads whose weights a call returns alone; raise unless they are some of H, each once, and not averaged.

    Args:
        weights_of_heads: what the call was given.
        H: of heads of the query.
        averages: whether the call asks for the mean over the heads too.

    Returns:
        The heads, in the order in which they were named.

    Raises:
        TypeError: they are no sequence of ints.
        ValueError: there are none, one comes twice, or ``averages``.
        IndexError: one is not from 0 to H - 1.
    """
    is_list = isinstance(weights_of_heads, (tuple, list, range))
    if not is_list or any(isinstance(head, bool) or not isinstance(head, int) for head in weights_of_heads):
        raise TypeError(f"weights_of_heads must be a tuple of ints, such as (0, 3); got {weights_of_heads!r}")
    heads = tuple(weights_of_heads)
    if not heads:
        raise ValueError("weights_of_heads must name a head at least, or be None for the weights of all; got none")
    if any(head < 0 or head >= H for head in heads):
        raise IndexError(f"weights_of_heads must name heads from 0 to H - 1 = {H - 1}; got {heads}")
    if len(set(heads)) < len(heads):
        raise ValueError(f"weights_of_heads must name a head once; got {heads}")
    if averages:
        raise ValueError(
            "weights_of_heads returns the weights of each head that it names, and no mean over heads: give "
            f"average_attn_weights=False beside it; got average_attn_weights=True and weights_of_heads={heads}"
        )
    return heads


def broadcasts(mask: Tensor, target: tuple[int, int, int, int]) -> bool:
    """Whether a 4-D mask has `target`'s size, or 1 anywhere but in the last dimension."""
    return mask.shape[3] == target[3] and all(
        size in (1, full) for size, full in zip(mask.shape[:3], target[:3], strict=True)
    )


def transposed_hint(mask: Tensor, rows: int, columns: int) -> str:
    """What a text adds where a mask of a wrong shape would fit, transposed."""
    return ". Is it transposed?" if rows != columns and mask.shape[-2:] == (columns, rows) else ""

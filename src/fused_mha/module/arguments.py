"""The arguments of `MultiHeadAttention.forward`, and their checks by torch's error types.

`MultiHeadAttention.forward` and `steps` check here, once, before anything is computed; `core.inputs` has the checks of
`attention`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_mha.core.inputs import broadcasts, check_mask_dtype, check_same_device, shape_of, transposed_hint, type_name
from fused_mha.core.modes import autocast_is_on


class ModuleArguments(NamedTuple):
    """What `MultiHeadAttention.forward` is called with, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    need_weights: bool
    attn_mask: Tensor | None
    average_attn_weights: bool
    is_causal: bool


def check_are_tensors(query: object, key: object, value: object) -> None:
    """Raise AttributeError, as torch's module does, unless they are tensors."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise AttributeError(f"{name} must be a Tensor, not {type_name(x)}")


def check_module_inputs(
    arguments: ModuleArguments,
    *,
    embed_dim: int,
    kdim: int,
    vdim: int,
    num_heads: int,
    batch_first: bool,
    weight: Tensor,
) -> tuple[int, bool]:
    """Check what `MultiHeadAttention.forward` is called with, by torch's error types.

    Args:
        arguments: its own, with the shapes that it describes.
        embed_dim: E.
        kdim: size of key's features.
        vdim: size of value's features.
        num_heads: H.
        batch_first: the layout of 3-D input.
        weight: the query's projection weight, which fixes dtype and device.

    Returns:
        N and whether the input is batched.

    Raises:
        AssertionError: ranks, embedding sizes, mask types, key_padding_mask's shape.
        RuntimeError: attn_mask's shape, batch sizes, dtypes and devices that disagree, one wrong size of key and value
            beside a packed weight.
        TypeError: a mask that is no tensor, num_heads that is no int.
    """
    query, key, value, key_padding_mask, _, attn_mask, _, _ = arguments
    if not hasattr(num_heads, "__index__"):
        raise TypeError(f"num_heads must be an int; got {num_heads!r}")
    rank = query.dim()
    if rank not in (2, 3):
        raise AssertionError(f"query must be unbatched 2-D or batched 3-D; got a {rank}-D tensor, {shape_of(query)}")
    is_batched = rank == 3
    if key.dim() != rank or value.dim() != rank:
        raise AssertionError(
            f"key and value must be {rank}-D, as query is; got {key.dim()}-D and {value.dim()}-D tensors, "
            f"{shape_of(key)} and {shape_of(value)}"
        )
    sequence_dim, batch_dim = (1, 0) if batch_first else (0, 1)
    if not is_batched:
        sequence_dim = 0
    L, S = query.shape[sequence_dim], key.shape[sequence_dim]
    N = query.shape[batch_dim] if is_batched else 1

    if query.shape[-1] != embed_dim:
        raise AssertionError(f"query must have embedding size embed_dim = {embed_dim}; got shape {shape_of(query)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            f"key and value must agree in length and batch size; got {shape_of(key)} and {shape_of(value)}"
        )
    if key.shape[-1] != kdim or value.shape[-1] != vdim:
        # Where both are wrong alike, torch's product with the packed weight is the first to see it.
        is_of_product = kdim == vdim == embed_dim and key.shape[-1] == value.shape[-1]
        raise (RuntimeError if is_of_product else AssertionError)(
            f"key and value must have sizes kdim = {kdim} and vdim = {vdim}; got {shape_of(key)} and {shape_of(value)}"
        )
    if is_batched and key.shape[batch_dim] != N:
        raise RuntimeError(
            f"query and key must have one batch size (dimension {batch_dim}, batch_first={batch_first}); got "
            f"{shape_of(query)} and {shape_of(key)}"
        )
    check_same_device(
        query,
        (
            ("key", key),
            ("value", value),
            ("key_padding_mask", key_padding_mask),
            ("attn_mask", attn_mask),
            ("the module's projection weight", weight),
        ),
    )
    if not (query.dtype == key.dtype == value.dtype == weight.dtype) and not autocast_is_on(query.device.type):
        raise RuntimeError(
            "query, key, value and the module's parameters must have one dtype (or run under torch.autocast); got "
            f"{query.dtype}, {key.dtype}, {value.dtype} and {weight.dtype}"
        )
    if key_padding_mask is not None:
        check_mask_dtype("key_padding_mask", key_padding_mask, AssertionError)
        expected = (N, S) if is_batched else (S,)
        if key_padding_mask.shape != expected:
            raise AssertionError(
                f"key_padding_mask must have shape {'(N, S)' if is_batched else '(S)'} = {expected}; got "
                f"{shape_of(key_padding_mask)}{transposed_hint(key_padding_mask, N, S)}"
            )
    if attn_mask is not None:
        check_module_attn_mask(attn_mask, N, num_heads, L, S, is_batched)
    return N, is_batched


def check_module_attn_mask(attn_mask: Tensor, N: int, H: int, L: int, S: int, is_batched: bool) -> None:
    """Raise, by torch's error types, unless a module's attn_mask has one of its shapes, and its dtype.

    Args:
        attn_mask: (L, S), (N * H, L, S) or (N|1, H|1, L|1, S).
        N: of the batch, 1 for unbatched input.
        H: of heads.
        L: of queries.
        S: of keys.
        is_batched: whether the call's input is.

    Raises:
        AssertionError: its rank or dtype, or the shape of a 3-D one of unbatched input.
        RuntimeError: another shape.
    """
    check_mask_dtype("attn_mask", attn_mask, AssertionError)
    mask_rank = attn_mask.dim()
    if mask_rank == 2:
        fits = attn_mask.shape == (L, S)
    elif mask_rank == 3:
        fits = attn_mask.shape == (N * H, L, S)
    elif mask_rank == 4:
        fits = broadcasts(attn_mask, (N, H, L, S))
    else:
        raise AssertionError(f"attn_mask must be 2-D, 3-D or 4-D; got a {mask_rank}-D tensor, {shape_of(attn_mask)}")
    if not fits:
        # torch checks an unbatched 3-D mask earlier than the others, by an assertion
        error = AssertionError if mask_rank == 3 and not is_batched else RuntimeError
        raise error(
            f"attn_mask must have shape (L, S) = {(L, S)}, (N*num_heads, L, S) = {(N * H, L, S)} or "
            f"(N|1, num_heads|1, L|1, S) with {(N, H, L, S)}; got {shape_of(attn_mask)}"
            f"{transposed_hint(attn_mask, L, S)}"
        )

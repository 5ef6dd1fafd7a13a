"""`pack` and `unpack`: a padded batch as packed rows, for `varlen_attention`, and back. Users call them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(x: Tensor, key_padding_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a padded batch that no mask hides, one sequence behind the other, and where each begins.

    Padding may be anywhere: on the left, on the right, or between.

    Args:
        x: (N, L, ...).
        key_padding_mask: (N, L), bool, True = padding.

    Returns:
        The rows (T, ...) and ``cu_seqlens`` (N + 1), int64, as `varlen_attention` takes them.

    Raises:
        RuntimeError: a ``key_padding_mask`` that is not bool, of another shape, on another device, or on meta, where it
            has no values.
        TypeError: a ``key_padding_mask`` that is no tensor.

    Examples:
        >>> x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
        >>> rows, cu_seqlens = fused_mha.pack(x, padding)
        >>> rows.shape, cu_seqlens
        (torch.Size([5, 8]), tensor([0, 2, 5]))

    Source:
        flash-attn's ``unpad_input``.
    """
    if isinstance(x, Tensor) and x.dim() < 2:
        raise RuntimeError(f"x must have at least 2 dimensions, (N, L, ...); got shape {tuple(x.shape)}")
    _check("x", x, key_padding_mask)
    if x.shape[:2] != key_padding_mask.shape:
        raise RuntimeError(
            f"key_padding_mask must have x's first two sizes, (N, L) = {tuple(x.shape[:2])}; got "
            f"{tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask.is_meta:
        raise RuntimeError(
            "key_padding_mask must have values, which say how many rows there are; got a tensor on meta, which has none"
        )
    lengths = key_padding_mask.logical_not().sum(dim=1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return x.flatten(0, 1).index_select(0, _places(key_padding_mask)), cu_seqlens


def unpack(rows: Tensor, key_padding_mask: Tensor) -> Tensor:
    """The inverse of `pack`: the padded batch, with zeros for padding.

    Args:
        rows: (T, ...), T the number of False in the mask.
        key_padding_mask: (N, L), bool, True = padding.

    Returns:
        (N, L, ...).

    Raises:
        RuntimeError: a ``key_padding_mask`` that is not bool, 2-D and on the device of ``rows``, or another number of
            rows than it has.
        TypeError: a ``key_padding_mask`` that is no tensor.

    Examples:
        >>> rows, padding = torch.ones(5, 1), torch.tensor([[False, False, True], [False, False, False]])
        >>> fused_mha.unpack(rows, padding).squeeze(2)
        tensor([[1., 1., 0.],
                [1., 1., 1.]])

    Source:
        flash-attn's ``pad_input``.
    """
    _check("rows", rows, key_padding_mask)
    if rows.dim() == 0:
        raise RuntimeError(f"rows must have at least 1 dimension, (T, ...); got shape {tuple(rows.shape)}")
    is_meta = key_padding_mask.is_meta  # without values: the places are any, as many as there are rows
    places = torch.arange(rows.shape[0], device="meta") if is_meta else _places(key_padding_mask)
    if torch.compiler.is_compiling():
        torch._check(rows.shape[0] == places.shape[0])
    elif rows.shape[0] != places.shape[0]:
        raise RuntimeError(
            f"rows must have as many rows as key_padding_mask has False, {places.shape[0]}; got shape "
            f"{tuple(rows.shape)}"
        )
    N, L = key_padding_mask.shape
    padded = rows.new_zeros((N * L, *rows.shape[1:]))
    return padded.index_put((places,), rows).unflatten(0, (N, L))


def _places(key_padding_mask: Tensor) -> Tensor:
    """Of the rows that are no padding, in the flattened batch."""
    return key_padding_mask.flatten().logical_not().nonzero().squeeze(1)


def _check(name: str, x: Tensor, key_padding_mask: Tensor) -> None:
    for argument, given in ((name, x), ("key_padding_mask", key_padding_mask)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{argument} must be a Tensor, not {type(given).__name__}")
    if key_padding_mask.dtype != torch.bool or key_padding_mask.dim() != 2:
        raise RuntimeError(
            "key_padding_mask must be 2-D, (N, L), and bool (True = padding); got shape "
            f"{tuple(key_padding_mask.shape)}, {key_padding_mask.dtype}"
        )
    if key_padding_mask.device != x.device:
        raise RuntimeError(f"key_padding_mask must be on {x.device}; got {key_padding_mask.device}")

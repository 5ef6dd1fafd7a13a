"""Nested tensors: ragged batches, whose sequences the module projects and attends to as packed rows.

The module's forward, and `explain`, call `packed`. `padded` is for the attention weights, which torch's module gives in
inference though they have no ragged form, and for devices without kernels of ours, since torch's take no packed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_mha.backends import cpu, triton
from fused_mha.backends.capability import device_reason
from fused_mha.core.modes import is_recorded, recordable
from fused_mha.core.varlen import offsets_of
from fused_mha.module.arguments import ModuleArguments

Repack = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Packed(NamedTuple):
    """The rows of nested input, one sequence behind the other, and where each sequence begins."""

    arguments: ModuleArguments  # with query (T_q, E), key (T_k, kdim) and value (T_k, vdim)
    cu_seqlens_q: Tensor  # (N + 1), int64
    cu_seqlens_k: Tensor
    repack: Callable[[Tensor], Tensor]  # from (T_q, E) to query's layout


def packed(module: nn.MultiheadAttention, arguments: ModuleArguments) -> Packed:
    """The rows of query, key and value.

    Args:
        module: has batch_first=True.
        arguments: its own, of which query, key and value are nested: N tensors of shape (L_n, E), (S_n, kdim) and
            (S_n, vdim), strided or jagged; key and value have the same lengths.

    Returns:
        The rows; what is one tensor stays one.

    Raises:
        AssertionError: anything else, as torch outside of its fast path.
    """
    query, key, value = arguments[:3]
    _check(arguments, module.batch_first)
    q, of_query = _rows(query)
    k, of_key = (q, of_query) if key is query else _rows(key)
    v, of_value = (q, of_query) if value is query else (k, of_key) if value is key else _rows(value)
    if not _are_equal(of_value, of_key, value, key):
        raise AssertionError(
            f"{_TAKES}: key and value must have the same lengths; got {_lengths(key)} and {_lengths(value)}"
        )

    def repack(output: Tensor) -> Tensor:
        if query.layout == torch.jagged:
            known: Any = query
            return torch.nested.nested_tensor_from_jagged(  # of query's own sizes, so that the two can be added
                output, known.offsets(), min_seqlen=known._maybe_min_seqlen, max_seqlen=known._maybe_max_seqlen
            )
        return torch.nested.as_nested_tensor([*output.split(_lengths(query))])

    return Packed(arguments._replace(query=q, key=k, value=v), of_query, of_key, repack)


def padded(module: nn.MultiheadAttention, arguments: ModuleArguments) -> tuple[ModuleArguments, Repack]:
    """Nested self-attention input with padding, in inference.

    Args:
        module: has batch_first=True.
        arguments: its own, of which query, key and value are the same strided nested tensor.

    Returns:
        The arguments with input (N, L, E) and its key_padding_mask, and a function that turns the output and the
        weights on padded tensors into the nested output and the weights with zeros for padded queries.

    Raises:
        AssertionError: anything else.
    """
    query = arguments.query
    _check(arguments, module.batch_first)
    if not _can_be_padded(module, arguments):
        raise AssertionError(
            f"{_TAKES}: need_weights must be False, since weights have no nested form; torch's padded ones are given "
            "of strided self-attention in inference alone"
        )
    lengths = _lengths(query)
    x = query.to_padded_tensor(0.0)
    positions = torch.arange(x.shape[1], device=query.device)
    padding = positions >= torch.tensor(lengths, device=query.device)[:, None]

    def repack(output: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ragged = torch.nested.as_nested_tensor([row[:length] for row, length in zip(output, lengths, strict=True)])
        if weights is not None:
            hidden = padding[:, :, None] if weights.dim() == 3 else padding[:, None, :, None]
            weights = weights.masked_fill(hidden, 0.0)
        return ragged, weights

    return arguments._replace(query=x, key=x, value=x, key_padding_mask=padding), repack


_TAKES = "MultiHeadAttention takes nested tensors as query, key and value"


_CORES = (cpu.BACKEND, triton.BACKEND)  # which take packed rows


def is_padded(module: nn.MultiheadAttention, arguments: ModuleArguments, wants_weights: bool) -> bool:
    """Whether a call is served by `padded`: one for weights, or on a device without kernels of ours."""
    return wants_weights or (not _has_kernels(arguments.query.device) and _can_be_padded(module, arguments))


def _has_kernels(device: torch.device) -> bool:
    return any(device_reason(core.capability, device) is None for core in _CORES)


def _can_be_padded(module: nn.MultiheadAttention, arguments: ModuleArguments) -> bool:
    query, key, value = arguments[:3]
    is_one = query is key and key is value and query.layout == torch.strided
    return is_one and not is_recorded(query, *module.parameters())


def _check(arguments: ModuleArguments, batch_first: bool) -> None:
    inputs: tuple[Any, ...] = arguments[:3]  # pyright knows no method of jagged tensors
    query, key, value, key_padding_mask, _, attn_mask, _, _ = arguments
    problem = None
    if not (query.is_nested and key.is_nested and value.is_nested):
        problem = "all three of them must be nested"
    elif any(x.dim() != 3 or (x.layout == torch.jagged and x._ragged_idx != 1) for x in inputs):
        problem = "each must be of N sequences (L, E)"
    elif not query.size(0) == key.size(0) == value.size(0):
        problem = f"they must be of as many sequences; got {query.size(0)}, {key.size(0)} and {value.size(0)}"
    elif any(x.layout == torch.jagged and x.lengths() is not None for x in inputs):
        problem = "one has holes: call contiguous() on it before"
    elif key_padding_mask is not None or attn_mask is not None:
        problem = "the lengths are the mask: key_padding_mask and attn_mask must be None"
    elif not batch_first:
        problem = "the module must be batch_first=True"
    if problem is not None:
        raise AssertionError(f"{_TAKES}: {problem}")


def _are_equal(of_value: Tensor, of_key: Tensor, value: Tensor, key: Tensor) -> bool:
    if of_value is of_key:
        return True
    if torch.compiler.is_compiling():  # which reads no values
        return value.size(1) == key.size(1)
    return torch.equal(of_value, of_key)


def _lengths(x: Tensor) -> list[int]:
    return [sequence.shape[0] for sequence in x.unbind()]


def _rows(x: Any) -> tuple[Tensor, Tensor]:
    """The rows, and where each sequence begins."""
    if x.layout == torch.jagged:
        return recordable(x.values()), offsets_of(x.offsets())
    sequences = x.unbind()
    lengths = torch.tensor([0, *(sequence.shape[0] for sequence in sequences)], device=x.device)
    return torch.cat(sequences), lengths.cumsum(0)

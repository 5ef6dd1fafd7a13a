"""Strided nested tensors: `nn.TransformerEncoder` hands them to `MultiHeadAttention` in inference.

The module's forward, and `explain`, call `unpack`: the ragged batch is padded, attended to with a key_padding_mask, and
cut back to the same lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Repack = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def unpack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    batch_first: bool,
    requires_grad: bool,
) -> tuple[Tensor, Tensor, Repack]:
    """Pad nested self-attention input.

    Args:
        query: nested, N tensors of shape (L_n, E).
        key: must be ``query``.
        value: must be ``query``.
        key_padding_mask: must be None.
        attn_mask: must be None.
        batch_first: must be True.
        requires_grad: whether the output would have to be differentiable; must be False.

    Returns:
        The padded input (N, L, E), its padding mask (N, L), True = padding, and a function that turns the output and
        the weights on padded tensors into the nested output and the weights with zeros for padded queries.

    Raises:
        AssertionError: anything else, as torch outside of its fast path.
    """
    problem = None
    if not (query is key and key is value):
        problem = "query, key and value must be the same nested tensor"
    elif query.layout != torch.strided:
        problem = f"the layout must be torch.strided, got {query.layout}"
    elif key_padding_mask is not None or attn_mask is not None:
        problem = "the lengths are the mask: key_padding_mask and attn_mask must be None"
    elif not batch_first:
        problem = "the module must be batch_first=True"
    elif requires_grad:
        problem = "it works in inference only, with grad mode off or nothing that requires a gradient"
    if problem is not None:
        raise AssertionError(f"MultiHeadAttention takes a NestedTensor for self-attention alone: {problem}")

    lengths = [sequence.shape[0] for sequence in query.unbind()]
    padded = query.to_padded_tensor(0.0)
    positions = torch.arange(padded.shape[1], device=query.device)
    padding = positions >= torch.tensor(lengths, device=query.device)[:, None]

    def repack(output: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ragged = torch.nested.as_nested_tensor([row[:length] for row, length in zip(output, lengths, strict=True)])
        if weights is not None:
            hidden = padding[:, :, None] if weights.dim() == 3 else padding[:, None, :, None]
            weights = weights.masked_fill(hidden, 0.0)
        return ragged, weights

    return padded, padding, repack

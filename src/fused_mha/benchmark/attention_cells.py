"""The sizes, the tensors and the contenders of the core, for `attention_cases` and the reports of `benchmarks/`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha.backends.cpu import LIBRARY
from fused_mha.core.attention import attention as our_attention
from fused_mha.ops.schema import drawn_probability

# From query (N, L, H, D), key and value (N, S, H, D) to the output (N, L, H, D) and, if wanted, the weights.
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Cell(NamedTuple):
    """The sizes of one call."""

    N: int
    H: int
    L: int
    S: int
    D: int

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.L if self.L == self.S else f'{self.L}->{self.S}'}x{self.D}"

    @property
    def flops(self) -> int:
        """Of a forward: its two products."""
        return 4 * self.N * self.H * self.L * self.S * self.D


LENGTHS = ((8, 12, 128), (8, 12, 197), (8, 12, 512), (1, 16, 1024), (1, 16, 2048), (1, 8, 4096))
MAIN = tuple(Cell(N, H, L, L, D) for D in (64, 128) for N, H, L in LENGTHS)
DECODING = tuple(Cell(8, 12, 1, S, D) for D in (64, 128) for S in (850, 4096))
ODD = (
    Cell(8, 12, 50, 50, 64),
    Cell(8, 12, 197, 197, 80),
    Cell(2, 8, 100, 850, 64),
    *(Cell(8, 12, 512, 512, D) for D in (32, 48, 80)),
)
QUICK = (Cell(2, 3, 64, 64, 64), Cell(1, 2, 128, 128, 128))
QUICK_DECODING, QUICK_ODD = (Cell(2, 3, 1, 850, 64),), (Cell(1, 2, 50, 850, 48),)


class Tensors(NamedTuple):
    """What goes in, and the fixed gradient of what comes out."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    key_padding_mask: Tensor  # (N, S), hides the latter half of the keys

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value


@functools.cache  # the groups share them
def tensors(cell: Cell, dtype: torch.dtype = torch.float32) -> Tensors:
    """Normally distributed tensors, the same in every dtype but for its rounding."""
    if dtype != torch.float32:
        return Tensors(*(x.to(dtype) if x.is_floating_point() else x for x in tensors(cell)))
    N, H, L, S, D = cell
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, L, H, D), (N, S, H, D), (N, S, H, D), (N, L, H, D))
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return Tensors(*drawn, key_padding_mask=(torch.arange(S) >= S // 2).expand(N, S))


@functools.cache
def grad_weights(cell: Cell) -> Tensor:
    """A fixed gradient of the averaged weights, (N, L, S)."""
    return torch.randn((cell.N, cell.L, cell.S), generator=torch.Generator().manual_seed(1))


def merged_mask(cell: Cell, key_padding_mask: Tensor) -> Tensor:
    """Causality and padding as one float mask (N, 1, L, S), which is what torch's fused op takes."""
    hidden = torch.ones(cell.L, cell.S, dtype=torch.bool).triu(1) | key_padding_mask[:, None, None, :]
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def ours(
    *, weights: bool = False, dropout: float = 0.0, is_causal: bool = False, key_padding_mask: Tensor | None = None
) -> Attention:
    """`fused_mha.attention`, with averaged weights if wanted."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output, averaged, _ = our_attention(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            dropout_p=dropout,
            need_weights=weights,
        )
        return (output,) if averaged is None else (output, averaged)

    return attention


def sdpa(*, dropout: float = 0.0, attn_mask: Tensor | None = None) -> Attention:
    """Torch's fused op, on the transposed views that a module would give it."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if attn_mask is None else attn_mask.to(query.dtype),
            dropout_p=dropout,
        )
        return (output.transpose(1, 2),)

    return attention


def bmm(*, weights: bool = False, dropout: float = 0.0, kept: Tensor | None = None) -> Attention:
    """The products, softmax, dropout (or a given mask of what our core has ``kept``) and mean, one after the other."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        scores = (query * query.shape[-1] ** -0.5).transpose(1, 2) @ key.permute(0, 2, 3, 1)
        probabilities = scores.softmax(dim=-1)  # (N, H, L, S)
        if kept is not None:
            probabilities = probabilities * kept / (1.0 - drawn_probability(dropout))
        elif dropout > 0.0:
            probabilities = F.dropout(probabilities, dropout)
        output = (probabilities @ value.transpose(1, 2)).transpose(1, 2)
        return (output, probabilities.mean(dim=1)) if weights else (output,)

    return attention


def forward(attention: Attention, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the outputs."""

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return attention(*inputs)

    return call


def forward_backward(
    attention: Attention, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the outputs, then the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def call() -> tuple[Tensor, ...]:
        outputs = attention(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    return call


def has_isa(name: str | None) -> bool:
    """Whether `forced_isa` can do so on this machine."""
    return name is None or (LIBRARY is not None and name in LIBRARY.available_isas)


@contextlib.contextmanager
def forced_isa(name: str | None) -> Iterator[None]:
    """That variant of the C++ library; none stands for the one in use."""
    if name is None or LIBRARY is None:
        yield
        return
    before = LIBRARY.isa
    LIBRARY.set_isa(name)
    try:
        yield
    finally:
        LIBRARY.set_isa(before)

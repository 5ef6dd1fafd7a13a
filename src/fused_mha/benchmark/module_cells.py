"""The sizes, the modules and the calls of the module; `module_cases` and the reports of `benchmarks/` use them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fused_mha.module.multi_head_attention import MultiHeadAttention

Run = Callable[[], tuple[Tensor, ...]]
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of two right results, as a share of the largest entry


class Cell(NamedTuple):
    """The sizes of one call: self-attention where L = S, else key and value are one other tensor."""

    N: int
    L: int
    S: int
    E: int
    H: int

    def __str__(self) -> str:
        return f"{self.N}x{self.L if self.is_self_attention else f'{self.L}->{self.S}'}x{self.E}x{self.H}"

    @property
    def is_self_attention(self) -> bool:
        """Whether query, key and value are one tensor."""
        return self.L == self.S

    @property
    def flops(self) -> int:
        """Of a forward: four projections, and the two products of the core."""
        return 4 * self.N * (self.L + self.S) * self.E**2 + 4 * self.N * self.L * self.S * self.E


SELF_ATTENTION = tuple(
    Cell(N, L, L, E, H)
    for N, L, E, H in (
        (8, 512, 768, 12),
        (1, 2048, 1024, 16),
        (1, 4096, 512, 8),
        (16, 197, 384, 6),
        (32, 50, 768, 12),
    )
)
MAIN = (*SELF_ATTENTION, Cell(2, 100, 850, 256, 8))
SMALL = (Cell(1, 16, 16, 256, 8), Cell(2, 48, 48, 128, 4))
TOKENS = tuple(Cell(1, L, L, E, E // 64) for L in (1, 8) for E in (256, 768, 1024, 2048))
SHORT_SEQUENCES = (Cell(256, 49, 49, 96, 3), Cell(1024, 8, 8, 64, 4))
QUICK_SELF_ATTENTION = (Cell(2, 32, 32, 64, 4),)
QUICK = (*QUICK_SELF_ATTENTION, Cell(2, 10, 24, 64, 4))
QUICK_SMALL = SMALL[:1]
QUICK_TOKENS = TOKENS[:1]
QUICK_SHORT_SEQUENCES = (Cell(16, 8, 8, 64, 4),)
AttnMask = Literal["bool", "float", "bool per head", "float per head"]


class Mode(NamedTuple):
    """A way of calling the module."""

    dtype: torch.dtype = torch.float32
    training: bool = False
    weights: bool = False  # averaged, if not per_head
    padding: float = 0.0  # the share of the keys that is hidden, at the end of every sequence
    causal: bool = False  # a causal attn_mask with the hint is_causal=True
    dropout: float = 0.0
    autocast: bool = False  # to bf16
    isa: str | None = None  # of our C++ library, the best if None
    per_head: bool = False  # the weights
    attn_mask: AttnMask | None = None  # random; no causal one beside it
    batch_first: bool = True
    device: str = "cpu"


class Modules(NamedTuple):
    """Ours and torch's, with the same parameters."""

    ours: MultiHeadAttention
    theirs: nn.MultiheadAttention


def modules(cell: Cell, mode: Mode) -> Modules:
    """Both modules as the mode wants them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dropout": mode.dropout, "batch_first": mode.batch_first, "dtype": mode.dtype}
    options["device"] = mode.device
    theirs = nn.MultiheadAttention(cell.E, cell.H, **options)
    ours = MultiHeadAttention(cell.E, cell.H, **options)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # one memory: neither weights are the colder ones
    return Modules(ours.train(mode.training), theirs.train(mode.training))


@functools.cache  # the groups share them
def inputs(
    cell: Cell, dtype: torch.dtype = torch.float32, batch_first: bool = True, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; what is one tensor in the call is one here."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        drawn = torch.randn(cell.N, length, cell.E, generator=generator).to(device, dtype)
        return drawn if batch_first else drawn.transpose(0, 1).contiguous()

    query = draw(cell.L)
    key = query if cell.is_self_attention else draw(cell.S)
    return query, key, key


def arguments(cell: Cell, mode: Mode) -> dict[str, Any]:
    """What else the modules are called with; in a mask True means ignore. The first key is never hidden."""
    given: dict[str, Any] = {"need_weights": mode.weights}
    if mode.per_head:
        given["average_attn_weights"] = False
    if mode.padding > 0.0:
        visible = max(1, int(cell.S * (1.0 - mode.padding)))
        given["key_padding_mask"] = (torch.arange(cell.S) >= visible).expand(cell.N, cell.S)
    if mode.causal:
        given["attn_mask"] = torch.ones(cell.L, cell.S, dtype=torch.bool).triu(1)
        given["is_causal"] = True
    if mode.attn_mask is not None:
        given["attn_mask"] = _attn_mask(cell, mode.attn_mask, mode.dtype)
    return {name: x.to(mode.device) if isinstance(x, Tensor) else x for name, x in given.items()}


def _attn_mask(cell: Cell, kind: AttnMask, dtype: torch.dtype) -> Tensor:
    """A bool mask hides a third of the keys; a float one is added to the scores and hides as many by -inf."""
    shape = (cell.N * cell.H, cell.L, cell.S) if kind.endswith("per head") else (cell.L, cell.S)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(shape, generator=generator) < 1 / 3
    hidden[..., 0] = False
    if kind.startswith("bool"):
        return hidden
    return torch.randn(shape, generator=generator).masked_fill_(hidden, float("-inf")).to(dtype)


def autocast(mode: Mode) -> contextlib.AbstractContextManager[object]:
    """Around a call, as in a model's forward: torch keeps cast parameters no longer than that."""
    return torch.autocast(mode.device, torch.bfloat16) if mode.autocast else contextlib.nullcontext()


def inference(module: nn.Module, cell: Cell, mode: Mode) -> Run:
    """A call that gives the output and, if wanted, the weights."""
    query, key, value = inputs(cell, mode.dtype, mode.batch_first, mode.device)
    others = arguments(cell, mode)

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad(), autocast(mode):
            output, weights = module(query, key, value, **others)
        return (output,) if weights is None else (output, weights)

    return call


def general_path(call: Run) -> Run:
    """The same call without torch's fast path."""

    def without_fast_path() -> tuple[Tensor, ...]:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return call()
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return without_fast_path


def training_step(module: nn.Module, cell: Cell, mode: Mode) -> Run:
    """A call that gives the output, weights if wanted, and the output's gradients of inputs and parameters."""
    given = inputs(cell, mode.dtype, mode.batch_first, mode.device)
    leaf_of = {id(x): x.clone().requires_grad_() for x in given}
    query, key, value = (leaf_of[id(x)] for x in given)
    leaves = [*leaf_of.values(), *module.parameters()]
    others = arguments(cell, mode)
    cotangent = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(mode.device, mode.dtype)

    def call() -> tuple[Tensor, ...]:
        with autocast(mode):
            output, weights = module(query, key, value, **others)
        output.backward(cotangent)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return tuple(x.detach() for x in (output, weights, *gradients) if x is not None)

    return call


class ModuleCall(NamedTuple):
    """A call of the module as data."""

    cell: Cell
    mode: Mode

    def of(self, module: nn.Module) -> Run:
        """The call, of ours or torch's."""
        return (training_step if self.mode.training else inference)(module, self.cell, self.mode)

    def ours(self) -> Run:
        """The call of a module of ours."""
        return self.of(modules(self.cell, self.mode).ours)


def assert_close(results: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Raise AssertionError where two runs differ by more than rounding: two that compute in different orders."""
    for result, other in zip(results, expected, strict=True):
        bound = ROUNDING[other.dtype] * float(other.abs().max())
        torch.testing.assert_close(result, other, rtol=0.0, atol=bound)

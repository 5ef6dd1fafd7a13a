"""`MultiHeadAttention` against `torch.nn.MultiheadAttention`, called with the same arguments.

In evaluation torch's own time is the better of its fast path and its general path. Run it by
`python benchmarks/run.py module`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_mha
from fused_mha.testing import assert_parity

from run import BenchCase, Contender

# N, L, embed_dim, num_heads
SMALL = (1, 16, 256, 8)
SHAPES = ((8, 128, 256, 8), (16, 197, 384, 6), (8, 512, 768, 12), (1, 2048, 1024, 16))

# While torch's own kernels do the work, ours may cost no more than 1.1 times torch's time (1.5 times where the call
# itself is most of the time).
BAR, SMALL_BAR = 1 / 1.1, 1 / 1.5


class Call(NamedTuple):
    """One way of calling the module."""

    name: str
    training: bool = False
    need_weights: bool = False
    padding: bool = False  # half of the keys of every sequence
    causal: bool = False  # a causal attn_mask with the hint is_causal=True
    dropout: float = 0.0
    batch_first: bool = True
    dtype: torch.dtype = torch.float32


CALLS = [
    call
    for training, mode in ((False, "inference"), (True, "training"))
    for call in (
        Call(mode, training),
        Call(f"{mode}, sequence first", training, batch_first=False),
        Call(f"{mode}, weights", training, need_weights=True),
        Call(f"{mode}, padding", training, padding=True),
        Call(f"{mode}, padding, weights", training, need_weights=True, padding=True),
        Call(f"{mode}, causal", training, causal=True),
        Call(f"{mode}, causal, padding", training, padding=True, causal=True),
        Call(f"{mode}, bf16", training, dtype=torch.bfloat16),
        Call(f"{mode}, bf16, weights", training, need_weights=True, dtype=torch.bfloat16),
    )
]
CALLS += [
    Call("training, dropout", training=True, dropout=0.1),
    Call("training, dropout, weights", training=True, need_weights=True, dropout=0.1),
]


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every call at every shape."""
    for shape in (SMALL,) if options.quick else (SMALL, *SHAPES):
        for call in CALLS:
            yield _case(shape, call, SMALL_BAR if shape is SMALL else BAR)


def _case(shape: tuple[int, int, int, int], call: Call, bar: float) -> BenchCase:
    N, L, embed_dim, num_heads = shape
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(
        embed_dim, num_heads, dropout=call.dropout, batch_first=call.batch_first, dtype=call.dtype
    ).train(call.training)
    ours = fused_mha.MultiHeadAttention(
        embed_dim, num_heads, dropout=call.dropout, batch_first=call.batch_first, dtype=call.dtype
    ).train(call.training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn((N, L, embed_dim) if call.batch_first else (L, N, embed_dim), dtype=call.dtype)
    arguments: dict[str, Any] = {"need_weights": call.need_weights}
    if call.padding:
        arguments["key_padding_mask"] = (torch.arange(L) >= L // 2).expand(N, L)
    if call.causal:
        arguments["attn_mask"] = torch.ones(L, L, dtype=torch.bool).triu(1)
        arguments["is_causal"] = True

    def verify() -> None:
        with torch.set_grad_enabled(call.training):
            assert_parity(ours, theirs, x, x, x, **arguments)

    baselines = {"torch": _contender(theirs, x, arguments)}
    if not call.training:
        baselines["torch general"] = _general_path(baselines["torch"])
    return BenchCase("x".join(map(str, shape)), call.name, _contender(ours, x, arguments), baselines, bar, verify)


def _contender(module: nn.MultiheadAttention, x: Tensor, arguments: dict[str, Any]) -> Contender:
    if not module.training:

        def infer() -> None:
            with torch.no_grad():
                module(x, x, x, **arguments)

        return infer
    leaf = x.clone().requires_grad_()
    cotangent = torch.randn(x.shape).to(x.dtype)

    def train() -> None:
        output, _ = module(leaf, leaf, leaf, **arguments)
        output.backward(cotangent)

    return train


def _general_path(call: Contender) -> Contender:
    def without_fast_path() -> None:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            call()
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return without_fast_path

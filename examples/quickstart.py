"""The uses of `torch.nn.MultiheadAttention` that tutorials show, with torch's result beside ours.

    python examples/quickstart.py

Each use prints the shapes, the first numbers of both results and their largest difference, and compares outputs,
attention weights and every gradient by the rule of `fused_mha.testing`: ours may be twice as far from an fp64 oracle as
torch's, plus a few units in the last place. The exit status is 1 if one of them differs by more.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_mha
from fused_mha.testing import assert_parity, tolerance


def first_numbers(tensor: Tensor) -> str:
    return "  ".join(f"{number: .6f}" for number in tensor.detach().flatten()[:4].tolist())


def print_beside(name: str, ours: Tensor, **others: Tensor) -> None:
    for whose, result in {**others, "ours": ours}.items():
        print(f"  {name:<8} {whose:<8} {first_numbers(result)}  ...  {tuple(result.shape)}")
    largest = max(float((ours - result).detach().abs().max()) for result in others.values())
    print(f"  {'':<8} largest difference {largest:.1e}")


def pair(embed_dim: int, num_heads: int, batch_first: bool) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Torch's module and ours, each made under seed 0: their parameters have the same values."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(embed_dim, num_heads, batch_first=batch_first)
    torch.manual_seed(0)
    ours = fused_mha.MultiHeadAttention(embed_dim, num_heads, batch_first=batch_first)
    return theirs, ours


def compare_self_attention(theirs: nn.Module, ours: nn.Module, x: Tensor, **masks: Any) -> None:
    their_output, their_weights = theirs(x, x, x, **masks)
    our_output, our_weights = ours(x, x, x, **masks)
    print_beside("output", our_output, torch=their_output)
    print_beside("weights", our_weights, torch=their_weights)
    assert_parity(ours, theirs, x, x, x, **masks)


def batch_first_self_attention() -> None:
    """Batch first: embed_dim 16, 4 heads, input (2, 5, 16); output and attention weights."""
    theirs, ours = pair(embed_dim=16, num_heads=4, batch_first=True)
    compare_self_attention(theirs, ours, torch.randn(2, 5, 16))


def sequence_first_self_attention() -> None:
    """Sequence first: embed_dim 256, 8 heads, input (10, 32, 256)."""
    theirs, ours = pair(embed_dim=256, num_heads=8, batch_first=False)
    compare_self_attention(theirs, ours, torch.randn(10, 32, 256))


def padding_after_the_fifth() -> None:
    """A boolean key_padding_mask (True = ignore) that hides the positions after the fifth."""
    theirs, ours = pair(embed_dim=256, num_heads=8, batch_first=False)
    padding = torch.zeros(32, 10, dtype=torch.bool)  # (N, S)
    padding[:, 5:] = True
    compare_self_attention(theirs, ours, torch.randn(10, 32, 256), key_padding_mask=padding)


def additive_mask() -> None:
    """A float attn_mask, torch.triu(torch.ones(10, 10), diagonal=1): it is added to the scores and hides nothing."""
    theirs, ours = pair(embed_dim=256, num_heads=8, batch_first=False)
    mask = torch.triu(torch.ones(10, 10), diagonal=1)
    compare_self_attention(theirs, ours, torch.randn(10, 32, 256), attn_mask=mask)


class TransformerEncoderLayer(nn.Module):
    """The encoder layer as tutorials write it by hand; sequence first, post-norm."""

    def __init__(self, d_model: int, num_heads: int, dim_feedforward: int = 2048, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, num_heads, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor, src_mask: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        attended, _ = self.self_attn(src, src, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)
        src = self.norm1(src + self.dropout(attended))
        fed_forward = self.linear2(self.dropout(F.relu(self.linear1(src))))
        return self.norm2(src + self.dropout(fed_forward))


def hand_written_encoder_layer() -> None:
    """A hand-written TransformerEncoderLayer (512, 8 heads, feed-forward 2048), converted; src_mask and padding."""
    torch.manual_seed(0)
    theirs = TransformerEncoderLayer(512, 8).eval()
    ours = copy.deepcopy(theirs)
    print(f"  fused_mha.convert(model).changed: {fused_mha.convert(ours).changed}")
    src = torch.randn(10, 4, 512)
    src_mask = torch.triu(torch.ones(10, 10, dtype=torch.bool), diagonal=1)  # causal; True = ignore
    padding = torch.arange(10) >= torch.tensor([[10], [7], [5], [1]])  # (N, S): four sequences of these lengths
    arguments: dict[str, Any] = {"src_mask": src_mask, "src_key_padding_mask": padding}
    print_beside("output", ours(src, **arguments), torch=theirs(src, **arguments))
    assert_parity(ours, theirs, src, **arguments)


class TextbookAttention(nn.Module):
    """Multi-head attention with four linear layers, as textbooks write it; batch first, scaled by the head size."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.query_proj = nn.Linear(embed_dim, embed_dim)
        self.key_proj = nn.Linear(embed_dim, embed_dim)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (N, H, L, D)
            for projected in (self.query_proj(query), self.key_proj(key), self.value_proj(value))
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


def textbook_state_dict(textbook: TextbookAttention) -> dict[str, Tensor]:
    """The weights of the four linear layers under the names of `torch.nn.MultiheadAttention`, and so of ours."""
    inward = (textbook.query_proj, textbook.key_proj, textbook.value_proj)
    return {
        "in_proj_weight": torch.cat([layer.weight for layer in inward]).detach(),
        "in_proj_bias": torch.cat([layer.bias for layer in inward]).detach(),
        "out_proj.weight": textbook.out_proj.weight.detach(),
        "out_proj.bias": textbook.out_proj.bias.detach(),
    }


def four_linear_textbook_module() -> None:
    """The textbook module of four linear layers: its weights load into ours and give the same output."""
    torch.manual_seed(0)
    textbook = TextbookAttention(embed_dim=64, num_heads=4)
    ours = fused_mha.MultiHeadAttention(embed_dim=64, num_heads=4, batch_first=True)
    theirs = nn.MultiheadAttention(embed_dim=64, num_heads=4, batch_first=True)
    for module in (ours, theirs):
        module.load_state_dict(textbook_state_dict(textbook))
    x, memory = torch.randn(2, 6, 64), torch.randn(2, 9, 64)
    arguments: dict[str, Any] = {"average_attn_weights": False}
    with torch.no_grad():
        results = textbook(x, memory, memory)
        their_results = theirs(x, memory, memory, **arguments)
        our_results = ours(x, memory, memory, **arguments)
        exact_results = copy.deepcopy(textbook).double()(x.double(), memory.double(), memory.double())
    for i, name in enumerate(("output", "weights")):
        print_beside(name, our_results[i], textbook=results[i], torch=their_results[i])
        exact = exact_results[i]
        allowed = tolerance(x.dtype, float((results[i] - exact).abs().max()), float(exact.abs().max()))
        error = float((our_results[i] - exact).abs().max())
        if not error <= allowed:  # nor if it is NaN
            raise AssertionError(f"{name}: largest error {error:.3e}, tolerance {allowed:.3e}")
    assert_parity(ours, theirs, x, memory, memory, **arguments)


USES: tuple[Callable[[], None], ...] = (
    batch_first_self_attention,
    sequence_first_self_attention,
    padding_after_the_fifth,
    additive_mask,
    hand_written_encoder_layer,
    four_linear_textbook_module,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every use; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    different = 0
    for number, use in enumerate(USES, start=1):
        print(f"{number}. {use.__doc__}")
        try:
            use()
        except AssertionError as error:
            different += 1
            print(f"  DIFFERS: {error}\n")
        else:
            print("  agrees\n")
    print(f"{len(USES) - different} of {len(USES)} uses agree with torch {torch.__version__}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

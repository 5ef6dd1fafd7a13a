"""Hypothesis strategies: calls of `fused_mha.attention` over the CPU library's whole space, in any memory layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from attention_oracle import make_arguments
from fused_mha.testing.strategies import sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_SHAPES = ("LS", "S", "4D LS", "4D S", "HS", "HLS", "NS", "NLS", "NHS", "NHLS")
LAYOUTS = ("contiguous", "heads first", "slice", "every second row", "gaps", "last dimension strided", "expanded")


def lay_out(x, layout):
    """The same numbers in other memory, with NaN (or True) between them; ``expanded`` repeats the first batch."""
    poison = True if x.dtype == torch.bool else float("nan")
    if layout == "heads first" and x.dim() >= 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), poison)
        wide[..., 3 : 3 + x.shape[-1]] = x
        return wide[..., 3 : 3 + x.shape[-1]]
    if layout == "every second row" and x.dim() >= 2:
        tall = x.new_full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), poison)
        tall[:, ::2] = x
        return tall[:, ::2]
    if layout == "gaps":
        spread = x.new_full(tuple(size + 1 for size in x.shape), poison)
        inner = spread[tuple(slice(0, size) for size in x.shape)]
        return inner.copy_(x)
    if layout == "last dimension strided":
        return torch.stack([x, torch.full_like(x, poison)], dim=-1)[..., 0]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


class Call(NamedTuple):
    """Arguments of one call; `seed` is what dropout draws."""

    arguments: dict
    seed: tuple[int, int]

    def __repr__(self):
        """Without the numbers, which Hypothesis would print by the thousand; its blob repeats the call."""
        shown = {
            name: (x.dtype, tuple(x.shape)) if isinstance(x, torch.Tensor) else x for name, x in self.arguments.items()
        }
        return f"Call({shown}, seed={self.seed})"

    def keep(self):
        """The dropout mask of the call, or None."""
        if not self.arguments["dropout_p"]:
            return None
        N, L, H, _ = self.arguments["query"].shape
        width = self.arguments["key"].shape[1] + ("bias_k" in self.arguments) + self.arguments["add_zero_attn"]
        seed = torch.tensor(self.seed)
        return torch.ops.fused_mha.dropout_mask(seed, (N, H, L, width), self.arguments["dropout_p"])


def weights_of_some(H):
    """Heads whose weights a call may return alone, in any order."""
    return st.permutations(range(H)).flatmap(lambda heads: st.integers(1, H).map(lambda n: tuple(heads[:n])))


@st.composite
def calls(draw, dtypes=DTYPES, dropout=(0.0,), smallest=0):
    """Any call; sizes around the edges of vectors, of row tiles (3, 6, 14), panels (8, 16, 32) and key tiles (256)."""

    def pick(*options):
        return draw(st.sampled_from(options))

    H_kv = pick(1, 1, 2, 3)
    H = H_kv * pick(1, 1, 2, 3)
    heads = draw(weights_of_some(H)) if draw(st.integers(0, 3)) == 0 else None
    L = draw(sizes(smallest, 12, 13, 14, 15, 28, 29, 43, 56, 57))
    S = draw(sizes(smallest, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 255, 257, 300))
    D = draw(sizes(1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80))
    D_v = D if draw(st.booleans()) else draw(sizes(1, 15, 16, 17, 31, 32, 33, 64, 65))
    arguments = make_arguments(
        N=pick(1, 1, 2, 3) if smallest else pick(0, 1, 1, 2, 3),
        L=L,
        S=S,
        H_kv=H_kv,
        H=H,
        D=D,
        D_v=D_v,
        dtype=pick(*dtypes),
        mask_dtype=pick(None, torch.bool, *DTYPES),
        mask_shape=pick(*MASK_SHAPES),
        padding_dtype=pick(None, torch.bool, *DTYPES),
        bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        hidden=pick(0.0, 0.2, 0.5, 0.95),
        is_causal=draw(st.booleans()),
        causal_alignment=pick("top_left", "bottom_right"),
        window=pick(None, None, (None, None), (0, 0), (2, None), (None, 3), (5, 20), (40, 1)),
        scale=pick(None, None, 0.3, 0.0, -0.4),
        softcap=pick(None, None, None, 0.4, 20.0),
        of_heads=pick((), (), ("sinks",), ("alibi_slopes",), ("sinks", "alibi_slopes")),
        dropout_p=pick(*dropout),
        need_weights=heads is None and draw(st.booleans()),
        average_attn_weights=draw(st.booleans()),
        weights_of_heads=heads,
        return_lse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            arguments[name] = lay_out(x, pick("contiguous", *LAYOUTS))
    return Call(arguments, (draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(-(2**63), 2**63 - 1))))

"""Hypothesis strategies: `fused_mha.testing.Case`s over the whole argument space of `nn.MultiheadAttention`."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from fused_mha.testing import Case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ATTN_MASKS = (None, "bool", "float", "bool per head", "float per head", "causal bool", "causal float")
PADDING_MASKS = (None, "bool", "float")

# torch's own error, the measure of ours, is the luck of one number where a tensor has one; examples go below.
SMALLEST_HEAD = 4


def examples(number: int) -> int:
    """How many examples a test takes in the profile that is loaded, that many in the one of every day."""
    return number * settings.default.max_examples // settings.get_profile("fixed").max_examples


seeds = st.integers(0, 2**31 - 1)


def sizes(smallest: int, *edges: int) -> st.SearchStrategy[int]:
    """Mostly a few, sometimes as many as cross the block of a vector or a tile."""
    return st.one_of(st.integers(smallest, 9), st.sampled_from(edges or (16, 17, 33)))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, allow_empty: bool = True) -> Case:
    """Any configuration and call that torch's module serves on its general path.

    Args:
        draw: Hypothesis' own.
        dtypes: to choose from.
        allow_empty: whether N, L and S may be 0.

    Returns:
        A case with no row that is masked everywhere, and with a truthful `is_causal` hint or none.
    """
    num_heads = draw(st.integers(1, 6))
    embed_dim = num_heads * draw(st.integers(SMALLEST_HEAD, 9))
    sharing = draw(st.sampled_from(("self", "cross", "separate")))
    batched = draw(st.booleans()) or draw(st.booleans())
    kdim = vdim = None
    if sharing != "self" and draw(st.booleans()):
        kdim = vdim = draw(st.integers(SMALLEST_HEAD, 20))
        if sharing == "separate":
            vdim = draw(st.none() | st.integers(SMALLEST_HEAD, 20))
    attn_mask = draw(st.sampled_from(ATTN_MASKS))
    key_padding_mask = draw(st.sampled_from(PADDING_MASKS))
    need_weights = draw(st.booleans())
    add_bias_kv, add_zero_attn = draw(st.booleans()), draw(st.booleans())
    # Beside virtual keys the hint is not truthful: torch without weights hides them, where the mask does not.
    can_hint = attn_mask is not None and "causal" in attn_mask and not (add_bias_kv or add_zero_attn)
    is_causal = can_hint and draw(st.booleans())
    # Without weights torch views its mask as (N, H, -1, S), which no tensor of size zero can be.
    smallest = 0 if allow_empty and (need_weights or attn_mask is key_padding_mask is None) else 1
    return Case(
        group="generated",
        N=draw(sizes(smallest)) if batched else 1,
        L=draw(sizes(smallest)),
        S=draw(sizes(smallest)),
        embed_dim=embed_dim,
        num_heads=num_heads,
        sharing=sharing,
        bias=draw(st.booleans()),
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        kdim=kdim,
        vdim=vdim,
        batch_first=draw(st.booleans()),
        batched=batched,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        need_weights=need_weights,
        average_attn_weights=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5))),
        training=draw(st.booleans()),
        strides=draw(st.sampled_from(("contiguous", "transposed", "expanded"))),
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def fast_path_cases(draw: st.DrawFn) -> Case:
    """Calls that torch's module serves on its inference fast path, under `torch.no_grad`."""
    num_heads = draw(st.sampled_from((2, 4, 6)))
    attn_mask = draw(st.sampled_from((None, "bool", "bool per head", "causal bool")))
    return Case(
        group="fast path",
        N=draw(sizes(1)),
        L=draw(sizes(1)),
        embed_dim=num_heads * draw(st.integers(SMALLEST_HEAD, 9)),
        num_heads=num_heads,
        attn_mask=attn_mask,
        key_padding_mask=draw(st.sampled_from((None, "bool"))),
        is_causal=attn_mask == "causal bool" and draw(st.booleans()),
        need_weights=draw(st.booleans()),
        average_attn_weights=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.5))),
        training=False,
        dtype=draw(st.sampled_from(DTYPES)),
    )

"""Hypothesis strategies over the argument space of `nn.MultiheadAttention`: configurations, inputs, masks and calls.

Users import them in tests of their own attention, and the project's tests draw from them. They need the package
hypothesis, which nothing else here does.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_mha.testing.cases import AttnMask, Case, PaddingMask, Sharing, Strides

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALLEST_HEAD = 4  # torch's error, the measure of ours, is the luck of one number where a tensor has one

Masks = dict[str, Tensor | None]
Inputs = tuple[Tensor, Tensor, Tensor]

seeds = st.integers(0, 2**31 - 1)


def sizes(smallest: int, *edges: int) -> st.SearchStrategy[int]:
    """Mostly a few, sometimes as many as cross the block of a vector or a tile."""
    return st.one_of(st.integers(smallest, 9), st.sampled_from(edges or (16, 17, 33)))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, allow_empty: bool = True, **fixed: Any) -> Case:
    """Any configuration and call that torch's module serves on its general path.

    Args:
        draw: Hypothesis' own.
        dtypes: to choose from.
        allow_empty: whether N, L and S may be 0.
        **fixed: fields of `Case` that are not drawn, such as ``embed_dim=64, num_heads=4``.

    Returns:
        A case with no row that is masked everywhere, and with a truthful ``is_causal`` hint or none.

    Raises:
        TypeError: ``fixed`` names no field of `Case`.

    Examples:
        >>> @given(case=strategies.cases(batch_first=True, dropout=0.0))
        ... def test_layer(case):
        ...     ours, theirs, inputs, arguments = case.build()
        ...     assert_parity(ours, theirs, *inputs, **arguments)
    """
    if unknown := fixed.keys() - set(Case._fields):
        raise TypeError(f"cases takes the fields of Case, {', '.join(Case._fields)}; got {', '.join(sorted(unknown))}")

    def field(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    def any_of(name: str, kinds: Any, *more: Any) -> Any:
        return field(name, st.sampled_from((*more, *get_args(kinds))))

    def flag(name: str) -> bool:
        return field(name, st.booleans())

    of_embed_dim = [n for n in range(1, 7) if fixed.get("embed_dim", 0) % n == 0]
    num_heads = field("num_heads", st.sampled_from(of_embed_dim))
    embed_dim = field("embed_dim", st.integers(SMALLEST_HEAD, 9).map(lambda head_dim: num_heads * head_dim))
    kdim, vdim = fixed.get("kdim"), fixed.get("vdim")
    of_one_size = {size or embed_dim for size in (kdim, vdim)}
    if of_one_size == {embed_dim}:
        sharing = any_of("sharing", Sharing)
    else:  # one tensor has one size
        sharing = field("sharing", st.sampled_from(("cross", "separate") if len(of_one_size) == 1 else ("separate",)))
    batched = field("batched", st.sampled_from((True, True, True, False)))
    if sharing != "self" and not fixed.keys() & {"kdim", "vdim"} and draw(st.booleans()):
        kdim = vdim = draw(st.integers(SMALLEST_HEAD, 20))
        if sharing == "separate":
            vdim = draw(st.none() | st.integers(SMALLEST_HEAD, 20))
    if fixed.get("is_causal"):
        fixed = {"attn_mask": draw(st.sampled_from(("causal bool", "causal float"))), **fixed}
        fixed = {"add_bias_kv": False, "add_zero_attn": False, **fixed}
    attn_mask = any_of("attn_mask", AttnMask, None)
    key_padding_mask = any_of("key_padding_mask", PaddingMask, None)
    need_weights = flag("need_weights")
    add_bias_kv, add_zero_attn = flag("add_bias_kv"), flag("add_zero_attn")
    # Beside virtual keys the hint is not truthful: torch without weights hides them, where the mask does not.
    can_hint = attn_mask is not None and "causal" in attn_mask and not (add_bias_kv or add_zero_attn)
    # Without weights torch views its mask as (N, H, -1, S), which no tensor of size zero can be.
    smallest = 0 if allow_empty and (need_weights or attn_mask is key_padding_mask is None) else 1
    drawn = Case(
        group="generated",
        N=field("N", sizes(smallest) if batched else st.just(1)),
        L=field("L", sizes(smallest)),
        S=field("S", sizes(smallest)),
        embed_dim=embed_dim,
        num_heads=num_heads,
        sharing=sharing,
        bias=flag("bias"),
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        kdim=kdim,
        vdim=vdim,
        batch_first=flag("batch_first"),
        batched=batched,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=can_hint and flag("is_causal"),
        need_weights=need_weights,
        average_attn_weights=flag("average_attn_weights"),
        dropout=field("dropout", st.sampled_from((0.0, 0.0, 0.1, 0.5))),
        training=flag("training"),
        strides=any_of("strides", Strides),
        dtype=field("dtype", st.sampled_from(dtypes)),
    )
    return drawn._replace(**fixed)


@st.composite
def fast_path_cases(draw: st.DrawFn) -> Case:
    """Calls that torch's module serves on its inference fast path, under `torch.no_grad`.

    Args:
        draw: Hypothesis' own.

    Returns:
        A case of self-attention in evaluation.

    Examples:
        >>> @given(case=strategies.fast_path_cases())
        ... def test_layer(case):
        ...     ours, theirs, inputs, arguments = case.build()
        ...     with torch.no_grad():
        ...         assert_parity(ours, theirs, *inputs, **arguments)
    """
    attn_mask = draw(st.sampled_from((None, "bool", "bool per head", "causal bool")))
    num_heads = draw(st.sampled_from((2, 4, 6)))
    return draw(
        cases(
            allow_empty=False,
            group="fast path",
            num_heads=num_heads,
            attn_mask=attn_mask,
            key_padding_mask=draw(st.sampled_from((None, "bool"))),
            sharing="self",
            batched=True,
            batch_first=True,
            bias=True,
            add_bias_kv=False,
            add_zero_attn=False,
            dropout=draw(st.sampled_from((0.0, 0.5))),
            strides="contiguous",
            training=False,
        )
    )


def inputs(
    embed_dim: int,
    *,
    kdim: int | None = None,
    vdim: int | None = None,
    batch_first: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> st.SearchStrategy[Inputs]:
    """Query, key and value of a module: three tensors, or one that is two or all of them; batched or not, any strides.

    Args:
        embed_dim: E, of the query.
        kdim: of the key; ``embed_dim`` if None.
        vdim: of the value; ``embed_dim`` if None.
        batch_first: the layout, (N, L, E) or (L, N, E).
        dtypes: to choose from.

    Returns:
        A strategy of (query, key, value) on the CPU, with N, L and S from 1 to 33.

    Examples:
        >>> @given(inputs=strategies.inputs(16))
        ... def test_layer(inputs):
        ...     assert_parity(ours, theirs, *inputs)
    """
    chosen = cases(dtypes, False, embed_dim=embed_dim, num_heads=1, kdim=kdim, vdim=vdim, batch_first=batch_first)
    return st.builds(lambda case, seed: case.inputs(_generator(seed)), chosen, seeds)


def masks(N: int, L: int, S: int, num_heads: int, *, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[Masks]:
    """The masks of a call, as keywords of a module's forward; no query is hidden from all keys.

    Args:
        N: batch.
        L: queries.
        S: keys.
        num_heads: H, as torch's masks of each head have the shape (N * H, L, S).
        dtype: of float masks.

    Returns:
        A strategy of ``{"attn_mask": ..., "key_padding_mask": ...}``: each None, bool or float, of (L, S) or
        (N * H, L, S) and of (N, S).

    Examples:
        >>> @given(masks=strategies.masks(N=2, L=5, S=5, num_heads=4))
        ... def test_layer(masks):
        ...     assert_parity(ours, theirs, x, x, x, **masks)
    """
    chosen = cases(N=N, L=L, S=S, embed_dim=num_heads, num_heads=num_heads, sharing="cross", batched=True, dtype=dtype)
    return st.builds(lambda case, seed: case.masks(_generator(seed)), chosen, seeds)


def calls(module: nn.MultiheadAttention) -> st.SearchStrategy[tuple[Inputs, dict[str, Any]]]:
    """Any call of a module: its inputs and forward's keywords, of the sizes, layout and dtype that the module has.

    Args:
        module: torch's, ours or another with the same attributes.

    Returns:
        A strategy of ((query, key, value), keywords).

    Examples:
        >>> @given(call=strategies.calls(theirs))
        ... def test_layer(call):
        ...     inputs, keywords = call
        ...     assert_parity(ours, theirs, *inputs, **keywords)
    """
    chosen = cases(
        allow_empty=False,
        **{name: getattr(module, name) for name in ("embed_dim", "num_heads", "kdim", "vdim", "batch_first")},
        **{name: getattr(module, name) for name in ("add_zero_attn", "dropout", "training")},
        add_bias_kv=module.bias_k is not None,
        dtype=module.out_proj.weight.dtype,
    )

    def call(case: Case, seed: int) -> tuple[Inputs, dict[str, Any]]:
        generator = _generator(seed)
        return case.inputs(generator), {**case.masks(generator), **case.flags()}

    return st.builds(call, chosen, seeds)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

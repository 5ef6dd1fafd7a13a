"""Configurations of `nn.MultiheadAttention` as data: the grid of `python -m fused_mha.parity`, and the tests' cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.activation import MultiheadAttention as TorchAttention

from fused_mha.module.multi_head_attention import MultiHeadAttention

Sharing = Literal["self", "cross", "separate"]
AttnMask = Literal["bool", "float", "bool per head", "float per head", "causal bool", "causal float"]
PaddingMask = Literal["bool", "float"]
Strides = Literal["contiguous", "transposed", "expanded"]


def name_of(dtype: torch.dtype) -> str:
    """``float32`` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


class Case(NamedTuple):
    """One configuration of the module and of a call; `build` makes the modules and the arguments of it.

    Examples:
        >>> ours, theirs, inputs, arguments = fused_mha.testing.Case(L=3, attn_mask="bool").build()
        >>> arguments["attn_mask"].shape
        torch.Size([3, 3])
    """

    group: str = "plain"
    N: int = 2
    L: int = 5
    S: int = 7  # without effect for self-attention
    embed_dim: int = 16
    num_heads: int = 4
    sharing: Sharing = "self"  # one tensor; key is value; three tensors
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = True
    batched: bool = True
    attn_mask: AttnMask | None = None
    key_padding_mask: PaddingMask | None = None
    is_causal: bool = False  # the hint, truthful: with a causal attn_mask alone
    need_weights: bool = True
    average_attn_weights: bool = True
    dropout: float = 0.0
    training: bool = True
    strides: Strides = "contiguous"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.group}, {name_of(self.dtype)}: {self.changed}"

    @property
    def changed(self) -> str:
        """The fields that are not the default, but for group and dtype."""
        changed = [
            f"{name}={value}"
            for name, value in self._asdict().items()
            if name not in ("group", "dtype") and value != self._field_defaults[name]
        ]
        return " ".join(changed) or "defaults"

    def build(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[MultiHeadAttention, TorchAttention, tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Make the two modules and the arguments of the call.

        Args:
            device: of the modules and tensors.
            seed: of all values.

        Returns:
            Ours, theirs with equal parameters (biases too are random), (query, key, value) and forward's keywords.
        """
        generator = torch.Generator().manual_seed(seed)
        constructor_arguments = {
            name: getattr(self, name)
            for name in (
                "embed_dim",
                "num_heads",
                "dropout",
                "bias",
                "add_bias_kv",
                "add_zero_attn",
                "kdim",
                "vdim",
                "batch_first",
                "dtype",
            )
        }
        theirs = TorchAttention(**constructor_arguments, device=device).train(self.training)
        with torch.no_grad():
            for parameter in theirs.parameters():
                spread = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
        ours = MultiHeadAttention(**constructor_arguments, device=device).train(self.training)
        ours.load_state_dict(theirs.state_dict())

        query, key, value = self.inputs(generator)
        moved = {id(x): x.to(device) for x in (query, key, value)}  # one tensor stays one tensor
        masks = {name: None if mask is None else mask.to(device) for name, mask in self.masks(generator).items()}
        return ours, theirs, (moved[id(query)], moved[id(key)], moved[id(value)]), {**masks, **self.flags()}

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw query, key and value, on the CPU; what the call shares is one tensor."""
        query = self._input(self.L, self.embed_dim, generator)
        if self.sharing == "self":
            return query, query, query
        key = self._input(self.S, self.kdim or self.embed_dim, generator)
        if self.sharing == "cross":
            return query, key, key
        return query, key, self._input(self.S, self.vdim or self.embed_dim, generator)

    def masks(self, generator: torch.Generator) -> dict[str, Tensor | None]:
        """Draw ``attn_mask`` and ``key_padding_mask``, on the CPU; no row is hidden everywhere."""
        return {"attn_mask": self._attn_mask(generator), "key_padding_mask": self._key_padding_mask(generator)}

    def flags(self) -> dict[str, bool]:
        """The other keywords of forward."""
        return {name: getattr(self, name) for name in ("need_weights", "average_attn_weights", "is_causal")}

    @property
    def _keys(self) -> int:
        return self.L if self.sharing == "self" else self.S

    def _input(self, length: int, features: int, generator: torch.Generator) -> Tensor:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        if not self.batched:
            return draw(length, features)
        shape = (self.N, length) if self.batch_first else (length, self.N)
        if self.strides == "transposed":
            return draw(shape[1], shape[0], features).transpose(0, 1)
        if self.strides == "expanded":
            one = (1, length) if self.batch_first else (length, 1)  # one sequence for the whole batch
            return draw(*one, features).expand(*shape, features)
        return draw(*shape, features)

    def _attn_mask(self, generator: torch.Generator) -> Tensor | None:
        if self.attn_mask is None:
            return None
        N, S = self.N if self.batched else 1, self._keys
        shape = (N * self.num_heads, self.L, S) if "per head" in self.attn_mask else (self.L, S)
        if "causal" in self.attn_mask:
            hidden = torch.ones(shape, dtype=torch.bool).triu(1)
        else:
            hidden = torch.rand(shape, generator=generator) < 0.3
            hidden[..., :1] = False  # a row that is hidden everywhere is NaN in torch
        if "bool" in self.attn_mask:
            return hidden
        values = torch.zeros(shape) if "causal" in self.attn_mask else torch.randn(shape, generator=generator)
        return values.masked_fill(hidden, float("-inf")).to(self.dtype)

    def _key_padding_mask(self, generator: torch.Generator) -> Tensor | None:
        if self.key_padding_mask is None:
            return None
        shape = (self.N, self._keys) if self.batched else (self._keys,)
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., :1] = False
        if self.key_padding_mask == "bool":
            return hidden
        return torch.randn(shape, generator=generator).masked_fill(hidden, float("-inf")).to(self.dtype)


def grid(*, full: bool = False) -> Iterator[Case]:
    """The configurations, in fp32; every one stands for a way in which people call the module.

    Args:
        full: also the product of sharing, masks, weights and mode, and larger shapes.

    Yields:
        `Case`s; ``case._replace(dtype=...)`` for other dtypes.

    Examples:
        >>> for case in fused_mha.testing.grid():
        ...     ours, theirs, inputs, arguments = case._replace(dtype=torch.float64).build()
    """
    for training in (True, False):
        for need_weights, average in ((True, True), (True, False), (False, True)):
            base = Case(training=training, need_weights=need_weights, average_attn_weights=average)
            yield from _around(base)
    if not full:
        return
    masks: list[tuple[AttnMask | None, PaddingMask | None]] = [
        (attn_mask, padding)
        for attn_mask in (None, "bool", "float", "bool per head", "float per head", "causal float")
        for padding in (None, "bool", "float")
    ]
    for sharing in ("self", "cross", "separate"):
        for attn_mask, padding in masks:
            for need_weights in (True, False):
                for add in (False, True):
                    yield Case(
                        "product",
                        sharing=sharing,
                        attn_mask=attn_mask,
                        key_padding_mask=padding,
                        need_weights=need_weights,
                        add_bias_kv=add,
                        add_zero_attn=add,
                    )
    for N, L, embed_dim, num_heads in ((4, 128, 128, 8), (1, 300, 192, 12), (2, 197, 96, 3)):
        for need_weights in (True, False):
            base = Case("large", N, L, embed_dim=embed_dim, num_heads=num_heads, need_weights=need_weights)
            yield base
            yield base._replace(attn_mask="causal bool", key_padding_mask="bool")


def _around(base: Case) -> Iterator[Case]:
    yield base
    for sharing in ("cross", "separate"):
        yield base._replace(group="plain", sharing=sharing)
    yield base._replace(bias=False)
    masks = base._replace(group="masks", sharing="separate")
    for attn_mask in ("bool", "float", "bool per head", "float per head"):
        yield masks._replace(attn_mask=attn_mask)
    for padding, attn_mask in (("bool", None), ("float", None), ("bool", "bool"), ("float", "float per head")):
        yield masks._replace(key_padding_mask=padding, attn_mask=attn_mask)
    for attn_mask in ("causal bool", "causal float"):
        yield base._replace(group="causal", attn_mask=attn_mask)
        yield base._replace(group="causal", attn_mask=attn_mask, is_causal=True)
        yield base._replace(group="causal", attn_mask=attn_mask, is_causal=True, sharing="cross")
    virtual = base._replace(group="virtual keys", sharing="cross", attn_mask="bool", key_padding_mask="bool")
    for add_bias_kv, add_zero_attn in ((True, False), (False, True), (True, True)):
        yield virtual._replace(add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
    layouts = base._replace(group="layouts", sharing="cross", key_padding_mask="float")
    yield layouts._replace(batch_first=False)
    yield layouts._replace(batched=False)
    yield layouts._replace(batched=False, attn_mask="float per head")
    yield layouts._replace(strides="transposed")
    yield layouts._replace(strides="expanded", batch_first=False)
    sizes = base._replace(group="kdim, vdim", sharing="separate")
    yield sizes._replace(kdim=12)
    yield sizes._replace(kdim=20, vdim=24, bias=False, attn_mask="float")
    yield sizes._replace(vdim=8, add_bias_kv=True, batch_first=False)
    for empty in ({"N": 0}, {"L": 0}, {"S": 0}):
        yield base._replace(group="empty", sharing="cross", **empty)
    if base.training:
        yield base._replace(group="dropout", dropout=0.3)
        yield base._replace(group="dropout", dropout=0.5, sharing="cross", attn_mask="float", add_zero_attn=True)

"""`RotaryEmbedding` and what scales it to longer texts: which angle each position turns a head by.

Users give one to `MultiHeadAttention` as ``rope``; `steps` asks it for angles, and `heads` turns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fused_mha.core.heads import RotaryLayout, Rotation
from fused_mha.core.modes import is_eager
from fused_mha.module.heads import transform_heads


class LinearScaling(NamedTuple):
    """Positions divided by ``factor`` (position interpolation).

    Attributes:
        factor: how many times longer the texts are than those of training; at least 1.

    Examples:
        >>> rope = fused_mha.RotaryEmbedding(64, scaling=fused_mha.LinearScaling(4.0))

    Source:
        Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation"
        (arXiv 2306.15595).
    """

    factor: float

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        """The frequencies of `RotaryEmbedding`, changed."""
        return [frequency / self.factor for frequency in frequencies]


class NTKScaling(NamedTuple):
    """The base times ``factor ** (dim / (dim - 2))``: the slowest pair is slowed by ``factor``, the fastest not at all.

    The base is one for all lengths. A base that follows the length, "dynamic" NTK, would not fit the keys of a cache.

    Attributes:
        factor: how many times longer the texts are than those of training; at least 1.

    Examples:
        >>> rope = fused_mha.RotaryEmbedding(64, scaling=fused_mha.NTKScaling(4.0))

    Source:
        Peng et al., "YaRN" (arXiv 2309.00071), section 3.1, "NTK-aware" interpolation.
    """

    factor: float

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        """The frequencies of `RotaryEmbedding`, changed."""
        pairs = len(frequencies)
        if pairs == 1:  # no other pair to be slower
            return frequencies
        return [frequency * self.factor ** (-j / (pairs - 1)) for j, frequency in enumerate(frequencies)]


class YaRNScaling(NamedTuple):
    """Slow pairs interpolated, fast ones left, those between by a ramp; and larger scores.

    Attributes:
        factor: how many times longer the texts are than those of training; at least 1.
        original_max_positions: the longest text of training.
        beta_fast: pairs with more turns over that length than this are left as they are.
        beta_slow: pairs with fewer turns than this are slowed by ``factor``.
        attention_factor: what cos and sin are multiplied by, and so both the rotated query and key;
            ``0.1 * ln(factor) + 1`` if None.
        truncate: whether the ends of the ramp are rounded to whole pairs.

    Examples:
        >>> rope = fused_mha.RotaryEmbedding(64, scaling=fused_mha.YaRNScaling(4.0, original_max_positions=4096))

    Source:
        Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (arXiv 2309.00071), sections
        3.2 to 3.4.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        """The frequencies of `RotaryEmbedding`, changed."""
        dim = 2 * len(frequencies)

        def pair_with(turns: float) -> float:
            return dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        length = max(last - first, 0.001)  # a ramp of no length is a step
        ramp = [min(max((j - first) / length, 0.0), 1.0) for j in range(dim // 2)]
        return [f * (1.0 - slow) + f / self.factor * slow for f, slow in zip(frequencies, ramp, strict=True)]

    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


class Llama3Scaling(NamedTuple):
    """Wavelengths above one bound are multiplied by ``factor``, those below another left, those between by a ramp.

    Attributes:
        factor: how many times longer the texts are than those of training; at least 1.
        original_max_positions: the longest text of training.
        low_freq_factor: the upper bound is ``original_max_positions / low_freq_factor``.
        high_freq_factor: the lower bound is ``original_max_positions / high_freq_factor``.

    Examples:
        >>> rope = fused_mha.RotaryEmbedding(64, scaling=fused_mha.Llama3Scaling(8.0, original_max_positions=8192))

    Source:
        Dubey et al., "The Llama 3 Herd of Models" (arXiv 2407.21783), section 3.4.2, and its published code,
        ``apply_scaling``.
    """

    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def scaled(self, frequencies: list[float], base: float) -> list[float]:
        """The frequencies of `RotaryEmbedding`, changed."""
        result = []
        for frequency in frequencies:
            turns = self.original_max_positions * frequency / (2 * math.pi)
            left = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            left = min(max(left, 0.0), 1.0)
            result.append(left * frequency + (1.0 - left) * frequency / self.factor)
        return result


RotaryScaling = LinearScaling | NTKScaling | YaRNScaling | Llama3Scaling
_SCALINGS = get_args(RotaryScaling)
_LEAST_TABLE = 256  # positions; tables grow by doubling


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary position embedding: pair j of a head's components is turned by position * base^(-2j / dim).

    A description without parameters or state, which any number of modules may share. The angles are computed in fp64,
    cos and sin rounded to fp32 (none for fp64), and kept for the positions that are counted.

    Args:
        dim: R, how many components of each head are rotated, the first ones; even, and at most the head size.
        base: of the geometric sequence of frequencies.
        layout: which components make a pair: j and j + R / 2 (``"half"``: GPT-NeoX, Llama in `transformers`) or 2j and
            2j + 1 (``"interleaved"``: the paper, GPT-J, Llama as published).
        scaling: `LinearScaling`, `NTKScaling`, `YaRNScaling` or `Llama3Scaling`, or None.

    Raises:
        ValueError: an odd ``dim``, a ``base`` of 1 or less, an unknown ``layout``, a ``scaling`` out of its range.
        TypeError: ``scaling`` is none of the four.

    Examples:
        >>> rope = fused_mha.RotaryEmbedding(64, base=500000.0)
        >>> attention = fused_mha.MultiHeadAttention(512, 8, rope=rope, batch_first=True)
        >>> rope(torch.randn(2, 5, 8, 64)).shape
        torch.Size([2, 5, 8, 64])

    Source:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864), section 3.2.2.
    """

    dim: int
    _: dataclasses.KW_ONLY
    base: float = 10000.0
    layout: RotaryLayout = "half"
    scaling: RotaryScaling | None = None
    _frequencies: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    _tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim must be a positive even number of components; got {self.dim!r}")
        if not self.base > 1.0:
            raise ValueError(f"base must be greater than 1; got {self.base!r}")
        if self.layout not in get_args(RotaryLayout):
            raise ValueError(f"layout must be 'half' or 'interleaved'; got {self.layout!r}")
        frequencies = [self.base ** (-2.0 * j / self.dim) for j in range(self.dim // 2)]
        if self.scaling is not None:
            _check_scaling(self.scaling)
            frequencies = self.scaling.scaled(frequencies, self.base)
        object.__setattr__(self, "_frequencies", tuple(frequencies))  # frozen for everyone else

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_tables": {}}

    def __call__(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate heads.

        Args:
            x: (N, L, H, D), of a floating dtype, D at least ``dim``.
            positions: (L) or (N, L), of an integer dtype; negative ones turn the other way. Counted from 0 if None.

        Returns:
            (N, L, H, D).

        Raises:
            TypeError: ``x`` or ``positions`` is no tensor or of another dtype.
            ValueError: ``x`` or ``positions`` is of another shape.
            RuntimeError: they are on different devices.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a tensor of a floating dtype; got {_kind(x)}")
        if x.dim() != 4 or x.shape[3] < self.dim:
            raise ValueError(
                f"x must have shape (N, L, H, D) with D of at least dim = {self.dim}; got {tuple(x.shape)}"
            )
        if positions is not None:
            check_positions(positions, x)
        return transform_heads(x, None, self.at(positions, x) if positions is not None else self.counted(0, x))

    def at(self, positions: Tensor, x: Tensor) -> Rotation:
        """The rotation at given positions, (L) or (N, L), for heads like ``x``."""
        return Rotation(*self._cos_sin(positions, _dtype_for(x)), self.layout)

    def counted(self, first: int, x: Tensor) -> Rotation:
        """The rotation of (N, L, H, D) heads at the positions from ``first`` on."""
        last, dtype = first + x.shape[1], _dtype_for(x)
        if not is_eager():  # compilers make their own constants of it
            return self.at(torch.arange(first, last, device=x.device), x)
        table = self._tables.get((dtype, x.device))
        if table is None or table[0].shape[0] < last:
            length = max(_LEAST_TABLE, 1 << (last - 1).bit_length())
            with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be saved
                cos, sin = self._cos_sin(torch.arange(length, device="cpu"), dtype)
                table = cos.to(x.device), sin.to(x.device)
            self._tables[dtype, x.device] = table
        cos, sin = table
        return Rotation(cos[first:last], sin[first:last], self.layout)

    def _cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = torch.tensor(self._frequencies, dtype=torch.float64, device=positions.device)
        angles = positions.unsqueeze(-1).to(torch.float64) * frequencies
        magnitude = self.scaling.magnitude() if isinstance(self.scaling, YaRNScaling) else 1.0
        return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def check_positions(positions: object, heads: Tensor, is_batched: bool = True) -> None:
    """Raise unless these are positions for heads (N, L, H, D): (L) or, of batched ones, (N, L), of an integer dtype."""
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be a tensor of an integer dtype; got {_kind(positions)}")
    N, L = heads.shape[:2]
    # By rank first: tuples of two ranks would compare N with L, which ties an exported program to what it finds.
    if not (positions.shape == (L,) if positions.dim() == 1 else is_batched and positions.shape == (N, L)):
        shapes = f"(L) = {(L,)}" + (f" or (N, L) = {(N, L)}" if is_batched else "")
        raise ValueError(f"positions must have shape {shapes}; got {tuple(positions.shape)}")
    if positions.device != heads.device:
        raise RuntimeError(f"positions must be on the heads' device, {heads.device}; got {positions.device}")


def _kind(x: object) -> object:
    return x.dtype if isinstance(x, Tensor) else type(x).__name__


def _dtype_for(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_scaling(scaling: RotaryScaling) -> None:
    if not isinstance(scaling, _SCALINGS):
        names = ", ".join(kind.__name__ for kind in _SCALINGS)
        raise TypeError(f"scaling must be None or one of {names}; got {scaling!r}")
    if not scaling.factor >= 1.0:
        raise ValueError(f"scaling must have a factor of at least 1; got {scaling}")
    if any(value is not None and not value > 0 for name, value in scaling._asdict().items() if name != "truncate"):
        raise ValueError(f"scaling must have numbers greater than 0; got {scaling}")
    if isinstance(scaling, YaRNScaling) and not scaling.beta_slow < scaling.beta_fast:
        raise ValueError(f"scaling must have beta_slow < beta_fast; got {scaling}")
    if isinstance(scaling, Llama3Scaling) and not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(f"scaling must have low_freq_factor < high_freq_factor; got {scaling}")

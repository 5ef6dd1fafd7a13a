"""What a `MultiHeadAttention` does beyond torch's: its options, checked once, and the parameters that they bring.

The module's constructor calls `checked` and `register`; `steps` reads the options, `loading` the names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from fused_mha.core.heads import QK_NORMS, HeadNorm, QKNorm
from fused_mha.core.inputs import Window, check_softcap, check_window
from fused_mha.core.modes import is_eager
from fused_mha.module.rotary import RotaryEmbedding

# Parameters that torch's module does not have.
# A checkpoint of torch's module may lack the first: as initialised, they are a beginning to train from.
OPTIONAL_NAMES = ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias", "sinks")
OWN_NAMES = (*OPTIONAL_NAMES, "gate_proj_weight", "gate_proj_bias")
L2_SCORES = 10.0  # q . k of one direction at first, as in Swin Transformer V2 (arXiv 2111.09883), section 3.3


class ModuleOptions(NamedTuple):
    """The options of one module, of which at least one is on. H, H_kv heads of D components, of D_v in the values."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: Window | None
    softcap: float | None
    sinks: bool
    rope: RotaryEmbedding | None
    qk_norm: QKNorm | None
    alibi_slopes: tuple[float, ...] | None
    gate: bool

    def rows(self) -> tuple[int, int, int]:
        """Of the weights that project query, key and value."""
        H_kv = self.num_kv_heads
        return self.num_heads * self.head_dim, H_kv * self.head_dim, H_kv * self.value_head_dim

    def described(self) -> str:
        """Those that are on, as in a call of the constructor."""
        shown = {
            "num_kv_heads": self.num_kv_heads if self.num_kv_heads != self.num_heads else None,
            "head_dim": self.head_dim if self.head_dim * self.num_heads != self.embed_dim else None,
            "value_head_dim": self.value_head_dim if self.value_head_dim != self.head_dim else None,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "rope": self.rope,
            "qk_norm": self.qk_norm,
            "alibi": self.alibi_slopes is not None,
            "gate": self.gate,
        }
        return ", ".join(
            f"{name}={value!r}" for name, value in shown.items() if value is not None and value is not False
        )


def checked(
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None,
    head_dim: int | None,
    value_head_dim: int | None,
    window: Window | None,
    softcap: float | None,
    sinks: bool,
    rope: RotaryEmbedding | None,
    qk_norm: QKNorm | None,
    alibi: bool | Tensor | Sequence[float],
    gate: bool,
) -> ModuleOptions | None:
    """The options of `MultiHeadAttention`'s constructor, resolved; None if all are off."""
    for name, number in (
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("value_head_dim", value_head_dim),
    ):
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{name} must be an int of at least 1, or None; got {number!r}")
    for name, flag in (("sinks", sinks), ("gate", gate)):
        if type(flag) is not bool:
            raise TypeError(f"{name} must be True or False; got {flag!r}")
    H_kv = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % H_kv:
        raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}; got {H_kv}")
    D = embed_dim // num_heads if head_dim is None else head_dim
    D_v = D if value_head_dim is None else value_head_dim
    check_window(window)
    if window is not None:
        window = None if tuple(window) == (None, None) else (window[0], window[1])
    check_softcap(softcap)
    if rope is not None:
        if not isinstance(rope, RotaryEmbedding):
            raise TypeError(f"rope must be a fused_mha.RotaryEmbedding or None; got {type(rope).__name__}")
        if rope.dim > D:
            raise ValueError(f"rope must rotate at most head_dim = {D} components; got dim = {rope.dim}")
    if qk_norm is not None and qk_norm not in QK_NORMS:
        raise ValueError(f"qk_norm must be one of {QK_NORMS} or None; got {qk_norm!r}")
    options = ModuleOptions(
        embed_dim,
        num_heads,
        H_kv,
        D,
        D_v,
        window,
        softcap,
        sinks,
        rope,
        qk_norm,
        _slopes(alibi, num_heads),
        gate,
    )
    is_as_in_torch = H_kv == num_heads and D_v == D and D * num_heads == embed_dim
    return None if is_as_in_torch and not any(options[5:]) else options


def _slopes(alibi: bool | Tensor | Sequence[float], num_heads: int) -> tuple[float, ...] | None:
    if alibi is False:
        return None
    if alibi is True:
        return alibi_slopes(num_heads)
    try:
        slopes = torch.as_tensor(alibi, dtype=torch.float64, device="cpu")  # whatever the default device
    except (TypeError, ValueError, RuntimeError) as error:
        text = f"alibi must be True, False or {num_heads} finite slopes, one for each head; got {alibi!r}"
        raise TypeError(text) from error
    if slopes.shape != (num_heads,) or not bool(slopes.isfinite().all()):
        raise ValueError(
            f"alibi must be True, False or {num_heads} finite slopes, one for each head; got "
            f"{'shape ' + str(tuple(slopes.shape)) if slopes.shape != (num_heads,) else slopes.tolist()}"
        )
    return tuple(slopes.tolist())


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The geometric sequence from 2^(-8 / H) on; where H is no power of two, that of the next lower power, and then
    every other one of the next higher.

    Source:
        Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3, and its published code.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / lower) for h in range(lower)]
    slopes += [2.0 ** (-4.0 * (h + 1) / lower) for h in range(0, 2 * (num_heads - lower), 2)]
    return tuple(slopes)


def slopes_for(slopes: tuple[float, ...], x: Tensor) -> Tensor:
    """The slopes as a tensor beside ``x``, in fp32, or fp64 for fp64."""
    of_slopes = _kept_tensor_of if is_eager() else _tensor_of  # compilers make their own constants
    return of_slopes(slopes, torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)


def _tensor_of(slopes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd could not save tensors of inference mode
        return torch.tensor(slopes, dtype=dtype, device=device)


_kept_tensor_of = functools.lru_cache(_tensor_of)


def register(module: nn.Module, options: ModuleOptions, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
    """Give a module the parameters of its options, `OWN_NAMES`, without values."""
    D, H = options.head_dim, options.num_heads
    gated = H * options.value_head_dim
    has_norm, has_norm_bias = options.qk_norm is not None, options.qk_norm == "layer"
    shapes = {
        "q_norm_weight": (D,) if has_norm else None,
        "q_norm_bias": (D,) if has_norm_bias else None,
        "k_norm_weight": (D,) if has_norm else None,
        "k_norm_bias": (D,) if has_norm_bias else None,
        "sinks": (H,) if options.sinks else None,
        "gate_proj_weight": (gated, module.embed_dim) if options.gate else None,
        "gate_proj_bias": (gated,) if options.gate and bias else None,
    }
    for name in OWN_NAMES:
        shape = shapes[name]
        module.register_parameter(
            name, None if shape is None else Parameter(torch.empty(shape, device=device, dtype=dtype))
        )


def reset(module: Any, options: ModuleOptions) -> None:
    """Draw the initial values of these parameters."""
    if options.qk_norm is not None:
        same = (L2_SCORES * options.head_dim**0.5) ** 0.5 if options.qk_norm == "l2" else 1.0
        nn.init.constant_(module.q_norm_weight, same)
        nn.init.constant_(module.k_norm_weight, same)
    for name in ("q_norm_bias", "k_norm_bias", "sinks", "gate_proj_bias"):
        if (parameter := getattr(module, name)) is not None:
            nn.init.zeros_(parameter)
    if options.gate:
        nn.init.xavier_uniform_(module.gate_proj_weight)


def norms(module: Any, options: ModuleOptions) -> tuple[HeadNorm, HeadNorm] | tuple[None, None]:
    """Those of the queries and of the keys, by the parameters as they are."""
    if options.qk_norm is None:
        return None, None
    return (
        HeadNorm(options.qk_norm, module.q_norm_weight, module.q_norm_bias),
        HeadNorm(options.qk_norm, module.k_norm_weight, module.k_norm_bias),
    )

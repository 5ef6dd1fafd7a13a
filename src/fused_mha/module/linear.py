"""`linear`, x W^T + b, by our own product where torch's is not faster. The projections and the module call it.

The rule is static. fp16 torch multiplies slowly on every CPU. In fp32 and fp64, given AVX-512, torch's library is
slower on AMD's processors and up to a tenth faster on Intel's, where ours makes that good as a part of one call with
the attention. In bfloat16 ours is the faster one with AVX2 and AVX-512: six and four times where the processor has no
instruction for it. With AMX, whose tiles both use, torch's is up to a third faster at many rows, and ours up to four
times at few. Where another instruction set than the best was chosen, torch multiplies bfloat16. A few rows, and calls
so small that each operator shows, ours serves in any dtype: it reads weights where they lie. Where `backend` forces
another one, torch multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha.backends import cpu
from fused_mha.core import dispatch
from fused_mha.core.memory import PLAIN_TYPES
from fused_mha.core.modes import autocast_is_on, is_eager, onnx_export_is_active, transform_is_active

RULE = "torch's own product is the faster one for this dtype, processor and number of rows"
_FP16, _HALVES = (torch.float16,), (torch.float16, torch.bfloat16)
_ALL = (*_HALVES, torch.float32, torch.float64)
_BY_ISA = {"avx2": _HALVES, "avx512": _ALL, "avx512_bf16": _ALL, "avx512_amx": _ALL}
_FEW_ROWS, _FEW_BESIDE_TILES = 32, 8
_TINY = 1 << 21  # rows * features^2


def dtypes() -> tuple[torch.dtype, ...]:
    """Those whose products are ours for any number of rows."""
    if cpu.LIBRARY is None:
        return ()
    ours = _BY_ISA.get(cpu.LIBRARY.isa, _FP16)
    return ours if cpu.LIBRARY.is_best_in_bf16 else tuple(dtype for dtype in ours if dtype is not torch.bfloat16)


def serves(dtype: torch.dtype, features: int, *sequences: Tensor) -> bool:
    """Whether our product is the faster one.

    Args:
        dtype: of all operands.
        features: E.
        *sequences: (..., in), whose rows are multiplied to E features. Their number is not asked for by tracers, for
            which a length is no number.

    Returns:
        Whether the rule above says so.
    """
    if dtype in dtypes():
        return True
    if cpu.LIBRARY is None or cpu.LIBRARY.isa not in _HAS_VECTORS or not is_eager():
        return False
    few = _FEW_BESIDE_TILES if dtype in cpu.LIBRARY.tile_dtypes else _FEW_ROWS
    rows = max(x.numel() // max(x.shape[-1], 1) for x in sequences)
    return rows <= few or rows * features * features <= _TINY


_HAS_VECTORS = ("neon", *_BY_ISA)


def is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our product serves this call; `linear` asks.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or None.

    Returns:
        True where ours is the faster one by the rule above, and nothing transforms the call.
    """
    if not x.is_cpu or x.dim() < 2 or not serves(x.dtype, x.shape[-1], x):
        return False
    return (
        dispatch.allows(cpu.BACKEND)
        and all(t is None or (type(t) in PLAIN_TYPES and t.dtype == x.dtype and t.is_cpu) for t in (x, weight, bias))
        and not transform_is_active()
        and not autocast_is_on("cpu")
        and not torch.jit.is_tracing()
        and not onnx_export_is_active()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a transposed weight and add a bias, as `torch.nn.functional.linear`.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or None.

    Returns:
        (..., out).
    """
    if not is_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return cpu.product(rows, weight, bias, False, True).view(*x.shape[:-1], weight.shape[0])

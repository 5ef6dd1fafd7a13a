"""`linear`, x W^T + b, by our own product where that is faster than torch's. The projections and the module call it.

The rule is static. fp16 torch multiplies slowly on every CPU. In fp32 and fp64 torch's library, Intel's MKL, takes its
slower path on processors of other makers: there ours serves, given AVX-512. bfloat16 is torch's, which has a fast path
of its own. Few rows are torch's too: packing the weight would cost more than it saves. Where
`backend` forces another one, torch multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha import dispatch
from fused_mha.backends import cpu
from fused_mha.modes import autocast_is_on, onnx_export_is_active, transform_is_active

_TYPES = (Tensor, torch.nn.Parameter)
FEWEST_ROWS = 32


def _dtypes() -> tuple[torch.dtype, ...]:
    """Those whose products are faster than torch's."""
    if cpu.LIBRARY is None:
        return ()
    if cpu.LIBRARY.isa.startswith("avx512") and cpu.LIBRARY.cpu_vendor != "GenuineIntel":
        return (torch.float16, torch.float32, torch.float64)
    return (torch.float16,)


def is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our product serves this call; `linear` asks.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or None.

    Returns:
        True where ours is the faster one by the rule above, and nothing transforms the call.
    """
    if x.dim() < 2 or x.dtype not in _dtypes():
        return False
    # A compiled graph serves any number of rows: it must not be compiled again for more of them.
    if not torch.compiler.is_compiling() and x.numel() < FEWEST_ROWS * x.shape[-1]:
        return False
    return (
        dispatch.allows("cpu")
        and all(t is None or (type(t) in _TYPES and t.dtype == x.dtype and t.is_cpu) for t in (x, weight, bias))
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

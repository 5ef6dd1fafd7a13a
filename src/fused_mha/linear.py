"""`linear`, x W^T + b, by our own product where that is faster than torch's. The projections and the module call it.

The rule is static. fp16 torch multiplies slowly on every CPU. In fp32 and fp64 torch's library, Intel's MKL, takes its
slower path on processors of other makers: there ours serves, given AVX-512. In bfloat16 torch's is as fast as ours
where both have AVX-512 BF16, but ours is part of one call with the attention; elsewhere, and on Intel, which has tiles
for it, torch's serves. Where `backend` forces another one, torch multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha import dispatch
from fused_mha.backends import cpu
from fused_mha.modes import autocast_is_on, onnx_export_is_active, transform_is_active

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
RULE = "torch's own product is the faster one for this dtype, processor and instruction set"
_FP16 = (torch.float16,)
_ALL_BUT_BF16 = (*_FP16, torch.float32, torch.float64)
_BY_ISA = {"avx512": _ALL_BUT_BF16, "avx512_bf16": (*_ALL_BUT_BF16, torch.bfloat16)}


def dtypes() -> tuple[torch.dtype, ...]:
    """Those whose products are faster than torch's."""
    if cpu.LIBRARY is None:
        return ()
    if cpu.LIBRARY.cpu_vendor == "GenuineIntel":
        return _FP16
    return _BY_ISA.get(cpu.LIBRARY.isa, _FP16)


def is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether our product serves this call; `linear` asks.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or None.

    Returns:
        True where ours is the faster one by the rule above, and nothing transforms the call.
    """
    if not x.is_cpu or x.dim() < 2 or x.dtype not in dtypes():
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

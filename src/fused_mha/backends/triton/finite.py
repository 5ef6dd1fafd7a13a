"""Rows without NaN and infinity where the padding hides them; `module` calls it before torch's products.

No score reads a hidden key, but the gradient of a weight is a product with all rows, and 0 * NaN = NaN. The gradient of
such an element is what it would be if it were 0.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_mha.backends.triton.launcher import Launcher, on_device
from fused_mha.backends.triton.tile_config import Launch
from fused_mha.backends.triton.tiles import TENSORS, Call, hides
from fused_mha.core.memory import aligned

_LAUNCH = Launch(BLOCK_M=1, BLOCK_N=1024, num_warps=4, num_stages=1)


class Rows(NamedTuple):
    """What the kernel is compiled for."""

    BLOCK: int
    GROUPED: bool = False
    MASK_UNIT: int = 1


@triton.jit
def finite_where_hidden(call, result, TILE: tl.constexpr):
    """A row of x, with zeros for NaN and infinity if the padding hides it.

    x is `call.query`, and `call.columns` the size of its rows. Row i is that of element i // L * S + i % L * N of the
    padding, which is contiguous.
    """
    row = tl.program_id(0)
    at = row // call.L * call.S + row % call.L * call.N
    is_hidden = hides(tl.load(call.padding + at))
    begin = row.to(tl.int64) * call.columns
    for first in range(0, call.columns, TILE.BLOCK):
        columns = first + tl.arange(0, TILE.BLOCK)
        is_read = columns < call.columns
        x = tl.load(call.query + begin + columns, mask=is_read, other=0.0)
        is_finite = tl.abs(x.to(tl.float32)) < float("inf")
        tl.store(result + begin + columns, tl.where(is_finite | (is_hidden == 0), x, 0.0), mask=is_read)


class Finite:
    """The kernel for inputs of one size, (N, S, E), or (S, N, E) where ``length_first``."""

    def __init__(self, sizes: tuple[int, int, int], length_first: bool) -> None:
        N, S, E = sizes
        numbers = dict.fromkeys(Call._fields[TENSORS:], 0) | {"scale": 0.0, "kept_factor": 0.0, "columns": E}
        numbers |= {"diagonal": None, "softcap": None, "place": None}
        numbers |= {"L": N, "S": 1, "N": S} if length_first else {"L": S, "S": S, "N": 1}
        call = Call(**dict.fromkeys(Call._fields[:TENSORS]), **numbers)
        self._launch = Launcher(finite_where_hidden, N * S, _LAUNCH, call, Rows(_LAUNCH.BLOCK_N))

    def __call__(self, x: Tensor, padding: Tensor) -> Tensor:
        """``x``, with zeros for NaN and infinity in the rows that the padding (N, S) hides."""
        x, padding = aligned(x.contiguous(), 1), aligned(padding.contiguous(), 1)
        result = torch.empty_like(x)
        with on_device(x.device.index):
            self._launch((x, None, None, None, padding, *[None] * (TENSORS - 5)), (result,))
        return result

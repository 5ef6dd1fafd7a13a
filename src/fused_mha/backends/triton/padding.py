"""Which keys of a batch element the padding leaves; `launch` calls it."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

from fused_mha.backends.triton.tiles import hides


@triton.jit
def padding_bounds(padding, padding_n, S, result, BLOCK: tl.constexpr):
    """The first visible key, and the last one exclusive, (N, 2); S and 0 where there is none."""
    n = tl.program_id(0).to(tl.int64)
    first = tl.zeros((BLOCK,), tl.int32) + S
    end = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = tl.load(padding + n * padding_n + columns, mask=columns < S, other=0)
        is_visible = (columns < S) & (hides(mask) == 0)
        first = tl.minimum(first, tl.where(is_visible, columns, S))
        end = tl.maximum(end, tl.where(is_visible, columns + 1, 0))
    tl.store(result + n * 2, tl.min(first, 0))
    tl.store(result + n * 2 + 1, tl.max(end, 0))

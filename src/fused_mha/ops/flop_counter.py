"""Torch's `register_flop_formula`, imported without a warning, and how many scores a call has; the operators' files
call both.
"""

import logging

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_log = logging.getLogger("torch.utils.flop_counter")
_was_disabled = _log.disabled
# CUDA builds of torch warn here from 2.11 on where there is no Triton, whose kernels no formula of ours is for.
_log.disabled = True
try:
    from torch.utils.flop_counter import register_flop_formula
finally:
    _log.disabled = _was_disabled

__all__ = ["count_scores", "register_flop_formula"]


def count_scores(N: int, L: int, S: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    """The scores of one head, N * L * S, or of packed sequences the sum of each one's.

    Offsets on meta and of `FakeTensorMode` have no values. The most that there can be are counted then, those of one
    sequence; torch's formulas count the most of theirs too.
    """
    if (
        cu_seqlens_q is None
        or cu_seqlens_k is None
        or any(x.is_meta or is_fake(x) for x in (cu_seqlens_q, cu_seqlens_k))
    ):
        return N * L * S
    return int((cu_seqlens_q.diff() * cu_seqlens_k.diff()).sum())

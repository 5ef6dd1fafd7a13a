"""How far from the fp64 oracle a result may lie: one rule and one table for the parity kit and the project's tests.

tolerance = FACTOR * (torch's own largest error) + FLOOR[dtype] * sqrt(terms) * (the oracle's largest magnitude).
"""

from __future__ import annotations

import math

import torch

FACTOR = 2.0

# Four units in the last place of the largest entry: what two right results may differ by where torch's is exact.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def tolerance(dtype: torch.dtype, torch_error: float, oracle_magnitude: float, terms: int = 1) -> float:
    """The largest error that passes.

    Args:
        dtype: in which the result was computed.
        torch_error: the largest error of torch's result in the same dtype against the oracle.
        oracle_magnitude: the oracle's largest magnitude.
        terms: how many terms each entry sums over, for gradients of parameters and masks.

    Returns:
        An absolute bound.
    """
    return FACTOR * torch_error + FLOOR[dtype] * math.sqrt(terms) * oracle_magnitude

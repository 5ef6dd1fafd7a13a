"""How far from the fp64 oracle a result may lie: one rule and one table for the parity kit and the project's tests.

tolerance = FACTOR * (torch's own largest error) + sqrt(terms) * (FLOOR[dtype] * (the oracle's largest magnitude)
            + FLOOR[float64] * (the largest magnitude of any result of the run)).

The last term is the oracle's own rounding: a result may be what is left where far larger terms cancel.
"""

from __future__ import annotations

import math

import torch

FACTOR = 2.0

# Four units in the last place of the largest entry: what two right results may differ by where torch's is exact.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def tolerance(
    dtype: torch.dtype, torch_error: float, oracle_magnitude: float, terms: int = 1, run_magnitude: float = 0.0
) -> float:
    """The largest error that passes.

    Args:
        dtype: in which the result was computed.
        torch_error: the largest error of torch's result in the same dtype against the oracle.
        oracle_magnitude: the oracle's largest magnitude.
        terms: how many terms each entry sums over, for gradients of parameters and masks.
        run_magnitude: the largest magnitude among the outputs and the gradients.

    Returns:
        An absolute bound.
    """
    oracle_error = FLOOR[torch.float64] * run_magnitude
    if oracle_magnitude <= oracle_error:  # zero as far as fp64 can tell: every dtype gives the rounding of its terms
        oracle_magnitude = run_magnitude
    return FACTOR * torch_error + math.sqrt(terms) * (FLOOR[dtype] * oracle_magnitude + oracle_error)

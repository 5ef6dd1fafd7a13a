"""How far from the fp64 oracle a result may lie: one rule and one table for the parity kit and the project's tests.

tolerance = FACTOR * (torch's own largest error)
            + growth * max(FLOOR[dtype] * (the oracle's largest magnitude), what rounding moves)

The second line stands by itself: torch's error is luck, and another one on another processor. `rounding_errors` finds
what rounding moves from the oracle: there cancelling sums and the size of the logits weigh as they do in every right
computation. growth = sqrt(terms) in fp32 and fp64, whose sums round after each term; half types are summed in fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FACTOR = 2.0

# Four units in the last place of the largest entry.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

_DRAWS = 2  # one alone may be near zero where a tensor has one entry


def tolerance(
    dtype: torch.dtype, torch_error: float, oracle_magnitude: float, terms: int = 1, rounding_error: float = 0.0
) -> float:
    """The largest error that passes.

    Args:
        dtype: in which the result was computed.
        torch_error: the largest error of torch's result in the same dtype against the oracle.
        oracle_magnitude: the oracle's largest magnitude.
        terms: how many terms the longest sum has that leads to the result.
        rounding_error: what rounding moves in the oracle, by `rounding_errors`.

    Returns:
        An absolute bound.

    Examples:
        >>> f"{fused_mha.testing.tolerance(torch.float32, torch_error=1e-7, oracle_magnitude=1.0):.1e}"
        '6.8e-07'
    """
    growth = math.sqrt(terms) if dtype in (torch.float32, torch.float64) else 1.0
    return FACTOR * torch_error + growth * max(FLOOR[dtype] * oracle_magnitude, rounding_error)


def rounding_errors(
    run: Callable[[], Mapping[str, Tensor | None]], exact: Mapping[str, Tensor | None], dtype: torch.dtype
) -> dict[str, float]:
    """How far an fp64 computation moves when each of its operations takes operands that were rounded to another dtype.

    Rounding is drawn: every operand is multiplied by numbers within one unit in the last place of 1, twice of what
    rounding does, since a right computation may be less lucky than the draws.

    Args:
        run: the computation, gradients too; it returns tensors by name.
        exact: what it returned.
        dtype: whose precision is drawn.

    Returns:
        The largest change of each tensor over a few draws.
    """
    errors = dict.fromkeys(exact, 0.0)
    for draw in range(_DRAWS):
        with _Rounded(dtype, draw):
            rounded = run()
        for name, expected in exact.items():
            x = rounded[name]
            if x is not None and expected is not None and x.numel():
                change = (x - expected).detach().abs().nan_to_num(nan=0.0, posinf=0.0)  # inf - inf = NaN where both are
                errors[name] = max(errors[name], float(change.max()))
    return errors


class _Rounded(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype, draw: int) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps
        self.first = draw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if all(argument.alias_info is None for argument in func._schema.arguments):  # no view, and nothing in place
            args = [self._rounded(x) for x in args]
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float64 or x.is_nested:
            return x
        noise = _noise(x.device)
        self.first = (self.first + 7919) % (noise.numel() // 2)  # other numbers for each operand
        noise = noise[self.first :]
        if x.numel() > noise.numel():
            noise = noise.repeat(-(-x.numel() // noise.numel()))
        return x * (1.0 + self.unit * noise[: x.numel()].view(x.shape))


@functools.cache
def _noise(device: torch.device) -> Tensor:
    return (
        torch.rand(2**18, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2.0).sub(1.0).to(device)
    )

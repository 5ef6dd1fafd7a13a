"""Compare tensors with an fp64 oracle by the one rule of tolerances, `fused_mha.testing.tolerances`: every test that
has an oracle comes here."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_mha.testing.tolerances import FLOOR, rounding_errors, tolerance


def assert_close_to_oracle(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    oracle: Callable[[], Mapping[str, Tensor]],
    terms: int | Mapping[str, int],
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that each of ours is as near to the fp64 oracle as the rule asks.

    Args:
        ours: the results under test, by name.
        theirs: torch's, in the same dtype.
        oracle: computes the same in fp64; once more where an error is not small anyhow.
        terms: how many terms the longest sum has that leads to a result.
        dtype: in which was computed, where some results are of a finer one.
    """
    exact = oracle()
    rounded: dict[torch.dtype, dict[str, float]] = {}
    assert set(ours) == set(exact)
    for name, expected in exact.items():
        result = ours[name]
        assert result.shape == expected.shape, name
        if not result.numel():
            continue
        infinite = expected.isinf()
        assert torch.equal(result[infinite].double(), expected[infinite]), name
        error, torch_error, magnitude = (
            float(x.detach().masked_fill(infinite, 0.0).abs().max())
            for x in (result.double() - expected, theirs[name].double() - expected, expected)
        )
        coarser = result.dtype if dtype is None or name == "lse" else max(result.dtype, dtype, key=FLOOR.__getitem__)
        longest = terms if isinstance(terms, int) else terms[name]
        bound = tolerance(coarser, torch_error, magnitude, longest)
        if not error <= bound:
            if coarser not in rounded:
                rounded[coarser] = rounding_errors(oracle, exact, coarser)
            bound = tolerance(coarser, torch_error, magnitude, longest, rounded[coarser][name])
        assert error <= bound, f"{name}: {error:.3e} from the oracle, {bound:.3e} allowed, torch {torch_error:.3e}"


def in_fp64(arguments: Any) -> Any:
    """The same with every floating tensor in fp64, also inside tuples, lists and dicts."""
    if isinstance(arguments, dict):
        return {name: in_fp64(x) for name, x in arguments.items()}
    if isinstance(arguments, (tuple, list)):
        return tuple(map(in_fp64, arguments))
    return arguments.double() if isinstance(arguments, Tensor) and arguments.is_floating_point() else arguments

"""Compare tensors that no two modules give, by the one table of tolerances: `fused_mha.testing.tolerances`."""

from torch import Tensor

from fused_mha.testing.tolerances import tolerance


def assert_close_to_oracle(ours: Tensor, theirs: Tensor, oracle: Tensor, terms: int = 1) -> None:
    """Assert that ours is as near to the fp64 oracle as the rule asks, theirs being torch's result.

    Args:
        ours: the result under test.
        theirs: torch's, in the same dtype.
        oracle: the same quantity in fp64.
        terms: how many terms each entry sums over, for gradients of parameters and masks.
    """
    assert ours.shape == theirs.shape == oracle.shape
    assert ours.dtype == theirs.dtype
    error, torch_error = (float((x.detach().double() - oracle.detach()).abs().max()) for x in (ours, theirs))
    bound = tolerance(ours.dtype, torch_error, float(oracle.detach().abs().max()), terms)
    assert error <= bound, f"largest error {error:.3e}, tolerance {bound:.3e} (torch's own error {torch_error:.3e})"

"""The kernels' exp2 against numpy's in a higher precision."""

import numpy as np
import pytest
import torch

from fused_mha.backends.cpu import LIBRARY

ULPS = 2


def exp2(x):
    return LIBRARY.exp2(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def largest_error_in_ulps(x, wide):
    exact = np.exp2(x.astype(wide))
    unit = np.spacing(exact.astype(x.dtype)).astype(wide)
    return float((np.abs(exp2(x).astype(wide) - exact) / unit).max())


def around_rounding_edges(dtype, lowest):
    """Integers and halves, where the exponent's rounding changes, and their neighbours."""
    centers = np.arange(2 * lowest, 1, dtype=dtype) / 2
    return np.concatenate([np.nextafter(centers, dtype(-np.inf)), centers, np.nextafter(centers, dtype(0))])


def test_fp32_is_within_two_units_in_the_last_place(base_isa):
    x = np.linspace(-126, 0, 1_500_001).astype(np.float32)
    tiny = -np.geomspace(1e-45, 1, 20_001).astype(np.float32)
    edges = around_rounding_edges(np.float32, -126)
    for sample in (x, tiny, edges[edges >= -126]):
        assert largest_error_in_ulps(sample, np.float64) <= ULPS


@pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="no number here is wider than fp64")
def test_fp64_is_within_two_units_in_the_last_place(base_isa):
    x = np.linspace(-1022, 0, 300_001)
    near = np.linspace(-40, 0, 100_001)
    tiny = -np.geomspace(5e-324, 1, 20_001)
    edges = around_rounding_edges(np.float64, -1022)
    for sample in (x, near, tiny, edges[edges >= -1022]):
        assert largest_error_in_ulps(sample, np.longdouble) <= ULPS


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["fp32", "fp64"])
class TestSpecialNumbers:
    def test_zero_gives_exactly_one(self, base_isa, dtype):
        assert np.array_equal(exp2(np.array([0.0, -0.0] * 20, dtype)), np.ones(40, dtype))

    def test_integers_give_exact_powers(self, base_isa, dtype):
        n = np.arange(np.finfo(dtype).minexp, 1)
        assert np.array_equal(exp2(n.astype(dtype)), np.ldexp(np.ones_like(n, dtype), n))

    def test_minus_infinity_gives_zero(self, base_isa, dtype):
        x = np.full(37, -np.inf, dtype)
        assert np.array_equal(exp2(x), np.zeros(37, dtype))

    def test_nan_gives_nan_in_its_place_alone(self, base_isa, dtype):
        x = np.zeros(37, dtype)
        x[[0, 5, 16, 36]] = np.nan
        assert np.array_equal(np.isnan(exp2(x)), np.isnan(x))
        assert np.array_equal(exp2(x)[~np.isnan(x)], np.ones(33, dtype))

    def test_far_below_the_smallest_number_gives_zero(self, base_isa, dtype):
        x = np.array([-127.6, -150.0, -1e4, -1e30, np.finfo(dtype).min], dtype)
        if dtype == np.float64:
            x[:2] = -1023.6, -1100.0
        assert np.array_equal(exp2(x), np.zeros(5, dtype))

    def test_any_count_gives_the_same_numbers(self, base_isa, dtype):
        x = np.linspace(-3, 0, 40).astype(dtype)
        for count in range(40):
            assert np.array_equal(exp2(x[:count]), exp2(x)[:count])

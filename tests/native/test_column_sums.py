"""`fused_mha_column_sums`, which sums the gradients of biases."""

import ctypes

import pytest
import torch

from closeness import assert_close_to_oracle
from native.c_abi import C, TensorFields

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 100, 64), (3, 33, 130), (2, 0, 7), (4, 1, 65)]


def column_sums(matrix, sums, threads=1, **changes):
    """The error's text, or None."""
    fields = {}
    for name, x in (("matrix", matrix), ("sums", sums)):
        fields[name] = TensorFields()
        fields[name].fill(x)
    for name, value in changes.items():
        which, attribute = name.split("_")
        setattr(fields[which], attribute, value)
    status = C.fused_mha_column_sums(*map(ctypes.byref, fields.values()), ctypes.c_int64(threads))
    return None if status == 0 else C.fused_mha_last_error().decode()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_slice", [False, True])
def test_they_are_as_near_to_the_oracle_as_torchs(isa, shape, dtype, is_slice):
    for matrix_dtype in {dtype, torch.float32 if dtype == torch.bfloat16 else dtype}:
        x = torch.randn(shape, dtype=torch.float64).to(matrix_dtype)
        if is_slice:
            wide = torch.full((shape[1] + 2, shape[0], shape[2] + 3), float("nan"), dtype=matrix_dtype)
            wide[1:-1, :, 1:-2] = x.transpose(0, 1)
            x = wide[1:-1, :, 1:-2].transpose(0, 1)
        around = torch.full((shape[2] + 2,), float("nan"), dtype=dtype)
        assert column_sums(x, around[1:-1]) is None
        theirs = x.sum((0, 1)).to(dtype)
        rows = shape[0] * shape[1]
        assert_close_to_oracle(
            {"sums": around[1:-1]}, {"sums": theirs}, lambda x=x: {"sums": x.double().sum((0, 1))}, rows
        )
        assert around[0].isnan()
        assert around[-1].isnan()


def test_a_matrix_of_no_columns_has_no_sums(base_isa):
    assert column_sums(torch.empty(2, 5, 0), torch.empty(0)) is None


def test_many_rows_are_summed_as_well_as_few(base_isa):
    x = torch.rand(1, 100_000, 20)
    sums = torch.empty(20)
    assert column_sums(x, sums) is None
    assert ((sums - x.double().sum((0, 1))).abs() / sums).max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits_is_read_and_rounded_to_as_in_torch(isa, dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    if dtype == torch.bfloat16:  # whose instructions take subnormal numbers as zeros
        values = values[(values.abs() >= 2**-117) | (values == 0) | values.isnan()]
    for others in (torch.zeros_like(values), values.roll(1), values.roll(4711)):
        rows = torch.stack([values, others])
        sums = torch.empty_like(values)
        assert column_sums(rows[None], sums) is None
        expected = (rows[0].float() + rows[1].float()).to(dtype)
        torch.testing.assert_close(sums, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(isa, dtype):
    x = torch.randn(3, 70, 300).to(dtype)
    alone, together = torch.empty(2, 300, dtype=dtype)
    assert column_sums(x, alone, threads=1) is column_sums(x, together, threads=3) is None
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix_bytes": 4 * 30 - 1}, "matrix"),
        ({"sums_bytes": 4 * 5 - 1}, "sums"),
        ({"matrix_dtype": 5}, "matrix"),
        ({"matrix_dtype": 1}, "matrix"),
        ({"sums_dtype": 1}, "matrix"),
        ({"sums_dtype": -1}, "sums"),
        ({"matrix_data": None}, "matrix"),
        ({"sums_data": None}, "sums"),
        ({"threads": 0}, "threads"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
    threads = changes.pop("threads", 1)
    sums = torch.full((5,), 7.0)
    error = column_sums(torch.ones(2, 3, 5), sums, threads, **changes)
    assert error is not None
    assert error.startswith(message)
    assert (sums == 7.0).all()


def test_sums_of_another_size_are_refused():
    assert column_sums(torch.ones(2, 3, 5), torch.zeros(4)).startswith("sums")

"""Fixtures of the tests of the CPU library: each instruction set in turn, and a number of threads that is put back."""

import pytest
import torch

from fused_mha.backends.cpu import LIBRARY
from native.c_abi import ISAS


@pytest.fixture(autouse=True)
def _needs_the_library():
    if LIBRARY is None:
        pytest.skip("this installation has no CPU library")


@pytest.fixture(scope="module", params=ISAS)
def isa(request):
    """Every instruction set that this machine runs; module-wide, since Hypothesis wants no narrower fixture."""
    former = LIBRARY.isa
    LIBRARY.set_isa(request.param)
    yield request.param
    LIBRARY.set_isa(former)


@pytest.fixture
def set_num_threads():
    """`torch.set_num_threads` until the end of the test."""
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)

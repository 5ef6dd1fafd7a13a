"""Fixtures of the tests of the CPU library: each instruction set in turn, and a number of threads that is put back.

An instruction set that adds products of bfloat16 to another leaves the other types to that one, as the library says
itself: no test runs the same code a second time. A test of several types, its `dtype`, takes `isa`; one of fp32 or fp64
alone, or of any, `base_isa`; one of bfloat16 beside that `bf16_isa`.
"""

import pytest
import torch

from fused_mha.backends.cpu import LIBRARY
from native.c_abi import ISAS, ISAS_OF


@pytest.fixture(autouse=True)
def _needs_the_library():
    if LIBRARY is None:
        pytest.skip("this installation has no CPU library")


def pytest_collection_modifyitems(items):
    """Leave out the types that an instruction set leaves to another."""

    def is_of_another(item):
        called_with = item.callspec.params if hasattr(item, "callspec") else {}
        return "isa" in called_with and called_with["isa"] not in ISAS_OF.get(called_with.get("dtype"), ISAS)

    items[:] = [item for item in items if not is_of_another(item)]


def _use(request):
    former = LIBRARY.isa
    LIBRARY.set_isa(request.param)
    yield request.param
    LIBRARY.set_isa(former)


@pytest.fixture(scope="module", params=ISAS)
def isa(request):
    """Every instruction set that this machine runs; module-wide, since Hypothesis wants no narrower fixture."""
    yield from _use(request)


@pytest.fixture(scope="module", params=ISAS_OF[torch.float32])
def base_isa(request):
    """Every one with code of its own for all types."""
    yield from _use(request)


@pytest.fixture(scope="module", params=[name for name in ISAS if name not in ISAS_OF[torch.float32]])
def bf16_isa(request):
    """Every one with code of its own for bfloat16 alone."""
    yield from _use(request)


@pytest.fixture
def set_num_threads():
    """`torch.set_num_threads` until the end of the test."""
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)

"""The CUDA core on a GPU; skipped where there is none. `benchmarks/run_cuda.py` runs these first."""

import os
import sys

import pytest
import torch

import fused_mha


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def _ends_the_process_with_the_device(request, _needs_a_gpu):
    """An illegal access makes every later call of the process fail: a worker ends, and xdist starts another."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"the CUDA device is lost after {request.node.nodeid}: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)


@pytest.fixture
def attention():
    """`fused_mha.attention` by the Triton kernels, of tensors on the CPU, for the oracle's sake."""

    def attention(**arguments):
        on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        with fused_mha.backend("triton"):
            results = fused_mha.attention(**on_gpu)
        return type(results)(*(None if x is None else x.cpu() for x in results))

    return attention

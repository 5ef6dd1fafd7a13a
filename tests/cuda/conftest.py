"""The CUDA core on a GPU; skipped where there is none. `benchmarks/run_cuda.py` runs these first."""

import pytest
import torch

import fused_mha


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture
def attention():
    """`fused_mha.attention` by the Triton kernels, of tensors on the CPU, for the oracle's sake."""

    def attention(**arguments):
        on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        with fused_mha.backend("triton"):
            results = fused_mha.attention(**on_gpu)
        return type(results)(*(None if x is None else x.cpu() for x in results))

    return attention

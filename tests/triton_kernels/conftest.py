"""The Triton kernels under Triton's interpreter, which runs them on the CPU; `tests/conftest.py` turns it on."""

import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def without_numpys_warnings():
    """The interpreter computes by NumPy, which warns of what `tl.where` then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture
def attention(monkeypatch):
    """`fused_mha.attention` on CPU tensors, computed by the Triton kernels, gradients too."""
    if torch.cuda.is_available():
        pytest.skip("tests/cuda runs the kernels on the GPU")
    import fused_mha
    from fused_mha.backends import cpu
    from fused_mha.backends.triton import launch

    def attention(**arguments):
        with fused_mha.backend("cpu"):
            return fused_mha.attention(**arguments)

    monkeypatch.setattr(cpu, "_forward", launch.attention)
    monkeypatch.setattr(cpu, "_backward", launch.attention_backward)
    return attention

"""The Triton kernels under Triton's interpreter, which runs them on the CPU."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported


@pytest.fixture
def attention(monkeypatch):
    """`fused_mha.attention` on CPU tensors, computed by the Triton kernels, gradients too."""
    import fused_mha
    from fused_mha.backends import cpu
    from fused_mha.backends.triton import launch
    from fused_mha.ops import gradients

    def backward(*inputs):
        return gradients.attention_backward(launch.attention_gradients, *inputs)

    def attention(**arguments):
        with fused_mha.backend("cpu"):
            return fused_mha.attention(**arguments)

    monkeypatch.setattr(cpu, "_forward", launch.attention)
    monkeypatch.setattr(cpu, "_backward", backward)
    return attention

"""The ways in which tests call the module: back ends, weights, a module of random parameters."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fused_mha
from fused_mha import MultiHeadAttention
from fused_mha.module import one_call

BACK_ENDS = ["cpu", "sdpa", "reference"]
WITH_WEIGHTS = ["cpu", "reference"]  # those that serve weights and dropout
CALLS = [("cpu", True), ("cpu", False), ("sdpa", False), ("reference", True), ("reference", False)]  # need_weights
NAN, INF = float("nan"), float("inf")

# What a call may return: (need_weights, average_attn_weights).
WEIGHTS = pytest.mark.parametrize(
    ("need_weights", "average"), [(True, True), (True, False), (False, True)], ids=["averaged", "per head", "none"]
)


def forced(back_end: str, need_weights: bool):
    """The back end; the reference for a call with weights, which sdpa cannot serve."""
    return fused_mha.backend("reference" if need_weights and back_end == "sdpa" else back_end)


def random_module(**arguments) -> MultiHeadAttention:
    """A module whose biases are not zero."""
    module = MultiHeadAttention(**{"embed_dim": 8, "num_heads": 2, "batch_first": True, **arguments})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def composed():
    """Products and attention one by one, as where a module's forward can't be one call of the library."""
    return mock.patch.multiple(one_call, forward=lambda *_, **__: None, small=lambda *_: None)


class Function(nn.Module):
    """A model that is a function of its inputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x

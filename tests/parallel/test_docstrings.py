"""The examples in the docstrings of `fused_mha.parallel` run, on two processes."""

import doctest
import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_mha
import fused_mha.parallel


class Model(nn.Module):
    """What an example calls `model`, of tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 16)
        layer = nn.TransformerEncoderLayer(16, 4, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers
        fused_mha.convert(self)

    def forward(self, codes):
        x = self.tokens(codes)
        for layer in self.layers:
            x = layer(x)
        return x


def told_by(name):
    """What doctest has to say of the example."""
    sizes = (1, 2) if name == "HeadwiseParallel" else (2, 1)
    mesh = dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=("context", "tensor"))
    known = {"fused_mha": fused_mha, "torch": torch, "mesh": mesh, "model": Model()}
    known |= {"tokens": torch.randint(10, (2, 32)), "logits": torch.randn(2, 4, 10)}
    known |= dict(zip(("query", "key", "value"), torch.randn(3, 2, 8, 4, 16), strict=True))
    if name == "HeadwiseParallel":
        pass
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(getattr(fused_mha.parallel, name)), known, name, None, None
    )
    assert example.examples
    told = []
    doctest.DocTestRunner().run(example, out=told.append)
    return told


@pytest.mark.parametrize("name", fused_mha.parallel.__all__)
def test_the_example_runs_on_two_ranks(two_ranks, name):
    assert two_ranks.run(told_by, name) == [[], []]

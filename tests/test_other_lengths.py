"""One program for many lengths: recompilations, export, and packages that are compiled ahead, with dynamic sizes."""

import pytest
import torch
from torch import nn

from fused_mha import MultiHeadAttention
from fused_mha.backends import cpu

E, H = 16, 4


def batch(N, L):
    return torch.randn(N, L, E), torch.arange(L) >= torch.randint(1, L + 1, (N, 1))


class Causal(nn.Module):
    """Self-attention behind padding, as models hold it."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(E, H, batch_first=True)

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)[0]


@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("marked", "most"), [(False, 2), (True, 1)], ids=["found out", "marked dynamic"])
def test_twenty_lengths_are_compiled_at_most_twice(marked, most, learns):
    model, graphs = Causal(), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for L in range(5, 25):
        x, padding = batch(3, L)
        x.requires_grad_(learns)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(padding, 1)
        with torch.set_grad_enabled(learns):
            torch.testing.assert_close(compiled(x, padding), model(x, padding))
    assert len(graphs) <= most


def exported(model, strict):
    N, L = torch.export.Dim("N"), torch.export.Dim("L")
    with torch.no_grad():
        return torch.export.export(model, batch(3, 9), dynamic_shapes=({0: N, 1: L}, {0: N, 1: L}), strict=strict)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_model_serves_every_batch_and_length(strict):
    model = Causal().eval()
    program = exported(model, strict).module()
    for N, L in ((1, 2), (3, 9), (5, 40)):
        arguments = batch(N, L)
        torch.testing.assert_close(program(*arguments), model(*arguments))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning")
@pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no CPU library")
def test_a_package_of_aotinductor_serves_every_batch_and_length(tmp_path):
    model = Causal().eval()
    package = torch._inductor.aoti_compile_and_package(exported(model, False), package_path=str(tmp_path / "model.pt2"))
    program = torch._inductor.aoti_load_package(package)
    for N, L in ((1, 2), (3, 9), (5, 40)):
        arguments = batch(N, L)
        torch.testing.assert_close(program(*arguments), model(*arguments))

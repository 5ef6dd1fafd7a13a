"""Whole modules on a GPU, projections and attention in one."""

import pytest
import torch

import fused_mha
from fused_mha.backends.triton import module as kept_modules
from module_calls import CASES, IDS, N, S, inputs, masks, matches_torch, modules


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # torch's, of a thread's first product
@pytest.mark.parametrize("part", range(8))  # for the workers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_agrees_with_torch(part, dtype, monkeypatch):
    count = 0

    def forward(*arguments):
        nonlocal count
        count += 1
        return step(*arguments)

    step = kept_modules.Kept.forward
    monkeypatch.setattr(kept_modules.Kept, "forward", forward)
    for case in CASES[part::8]:
        print(IDS[CASES.index(case)])
        matches_torch(case, "cuda", dtype)
    assert count > 0 or dtype == torch.float32  # which torch's kernels serve


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_is_not_finite_in_hidden_rows_reaches_nothing(dtype, need_weights):
    ours, _ = modules("cuda", dtype, batch_first=True)
    (x, _, _), arguments = inputs("self", True, "cuda", dtype), masks("padding", S, "self", "cuda")
    x[arguments["key_padding_mask"]] = float("nan")
    x.requires_grad_()
    output, _ = ours(x, x, x, need_weights=need_weights, **arguments)
    output.float().square().sum().backward()
    for y in (output, x.grad, *(parameter.grad for parameter in ours.parameters())):
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_that_see_nothing_give_the_bias_of_out_proj(dtype):
    ours, _ = modules("cuda", dtype, batch_first=True)
    x, _, _ = inputs("self", True, "cuda", dtype)
    hidden = torch.ones(N, S, dtype=torch.bool, device="cuda")
    x.requires_grad_()
    for need_weights in (True, False):
        output, weights = ours(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        torch.testing.assert_close(output, ours.out_proj.bias.expand_as(output))
        assert weights is None or not weights.any()
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert not grad.any()


def test_plain_inference_gives_the_bits_of_the_steps():
    module = fused_mha.MultiHeadAttention(256, 8, batch_first=True, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(4, 40, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found = [module(x, x, x, need_weights=False)[0] for _ in range(2)]
        module.out_proj.register_forward_hook(lambda *_: None)  # then the steps are taken
        expected = module(x, x, x, need_weights=False)[0]
    assert all(torch.equal(y, expected) for y in found)


def test_a_graph_replays_a_module_with_other_values():
    module = fused_mha.MultiHeadAttention(64, 4, batch_first=True, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(2, 33, 64, device="cuda", dtype=torch.bfloat16)
    hidden = torch.arange(33, device="cuda").expand(2, -1) >= 20
    with torch.no_grad():
        for _ in range(2):
            module(x, x, x, key_padding_mask=hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = module(x, x, x, key_padding_mask=hidden)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, module(x, x, x, key_padding_mask=hidden)[0])

"""The CUDA core inside torch: memory, determinism, streams, devices, graphs, torch.compile."""

import pytest
import torch

import fused_mha
from fused_mha.core import plans

DROPOUT = {"dropout_p": 0.2, "is_causal": True}


def tensors(*shape, dtype=torch.bfloat16, device="cuda"):
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


def padding(N, S):
    return torch.arange(S, device="cuda") >= torch.arange(S // 2, S // 2 + N, device="cuda")[:, None]


def gradients(query, key, value, **arguments):
    results = fused_mha.attention(query, key, value, **arguments)
    loss = results.output.float().square().sum()
    if results.weights is not None:
        loss = loss + results.weights.float().square().sum()
    return [results.output.detach(), *torch.autograd.grad(loss, (query, key, value))]


def test_twenty_runs_give_the_same_bits():
    q, k, v = tensors(4, 300, 8, 64)
    mask = torch.randn(1, 8, 300, 300, device="cuda", requires_grad=True)

    def run():
        torch.manual_seed(3)
        found = gradients(q, k, v, attn_mask=mask, key_padding_mask=padding(4, 300), need_weights=True, **DROPOUT)
        return [x.clone() for x in found]

    first = run()
    for _ in range(19):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


def test_averaged_weights_take_no_tensor_for_each_head():
    module = fused_mha.MultiHeadAttention(1024, 16, batch_first=True, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(1, 4096, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        module(x, x, x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module(x, x, x)
        peak = torch.cuda.max_memory_allocated() - before
    weights = 4096 * 4096 * 2  # bytes of the result; a tensor for each head has 16 times as many
    assert peak < 3 * weights


def test_a_call_runs_on_the_current_stream():
    q, k, v = tensors(2, 512, 8, 64)
    expected = gradients(q, k, v, key_padding_mask=padding(2, 512))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            doubled = (2 * q).detach().requires_grad_()
            found.append(gradients((doubled / 2).detach().requires_grad_(), k, v, key_padding_mask=padding(2, 512)))
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_call_runs_on_the_device_of_its_tensors():
    q, k, v = tensors(2, 64, 4, 64, device="cuda:1")
    assert torch.cuda.current_device() == 0
    output = fused_mha.attention(q, k, v, need_weights=True).output
    assert output.device == q.device
    assert output.isfinite().all()


def test_a_graph_draws_dropout_anew_at_every_replay():
    q, k, v = (x.detach() for x in tensors(2, 128, 4, 64))

    def call():
        return fused_mha.attention(q, k, v, dropout_p=0.5).output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    first = captured.clone()
    graph.replay()
    assert not torch.equal(first, captured)
    assert captured.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of inductor's own, torch 2.11
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of inductor's too
@pytest.mark.parametrize(
    "arguments",
    [{}, {"need_weights": True}, {"attn_mask": "float"}, {"dropout_p": 0.3}],
    ids=["plain", "weights", "mask", "dropout"],
)
def test_torch_compile_has_no_graph_break(arguments):
    q, k, v = tensors(2, 96, 4, 64, dtype=torch.float32)
    if "attn_mask" in arguments:
        arguments = {"attn_mask": torch.randn(96, 96, device="cuda")}

    def call(q, k, v):
        return fused_mha.attention(q, k, v, key_padding_mask=padding(2, 96), **arguments).output

    torch.manual_seed(1)
    expected = torch.autograd.grad(call(q, k, v).sum(), (q, k, v))
    compiled = torch.compile(call, fullgraph=True)
    torch.manual_seed(1)
    found = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    if "dropout_p" not in arguments:  # the compiled program draws its own seed
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"need_weights": True}, {"dropout_p": 0.3}, {"is_causal": True}],
    ids=["", "weights", "dropout", "causal"],
)
def test_a_kind_of_call_that_came_before_gives_the_bits_of_the_general_way(arguments, monkeypatch):
    q, k, v = tensors(2, 96, 4, 64)

    def found():
        torch.manual_seed(2)
        return gradients(q, k, v, key_padding_mask=padding(2, 96), **arguments)

    with monkeypatch.context() as patch:
        patch.setattr("fused_mha.core.plans.DEVICE", "none")
        expected = found()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(found(), expected, strict=True))


def test_later_launches_are_by_address(monkeypatch):
    from fused_mha.backends.triton import launcher

    launches, launch = [], launcher.static_launch
    assert launch is not None
    monkeypatch.setattr(launcher, "static_launch", lambda *arguments: (launches.append(arguments), launch(*arguments)))
    plans.forget()  # of whose kinds an earlier test may have launched kernels
    q, k, v = tensors(3, 40, 4, 64)
    for _ in range(3):
        gradients(q, k, v, key_padding_mask=padding(3, 40))
    assert len(launches) == 2 * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_plain_calls_are_left_to_torch(dtype):
    module = fused_mha.MultiHeadAttention(64, 4, batch_first=True, device="cuda", dtype=dtype)
    x = torch.randn(2, 10, 64, device="cuda", dtype=dtype)
    assert fused_mha.explain(module, x, need_weights=False).chosen == "sdpa"
    assert fused_mha.explain(module, x).chosen == "triton"
    assert fused_mha.explain(module, x[:, :1], x, x, need_weights=False).chosen == "triton"

"""Packed sequences on a GPU: every option against the oracle, offsets that the host does not read, CUDA graphs."""

import pytest
import torch

import fused_mha
from closeness import assert_close_to_oracle, in_fp64
from packed_calls import OPTIONS, cu_seqlens, one_by_one, packed_call, with_gradients
from test_varlen import reference

LENGTHS = ((70, 0, 300, 1, 33, 0), (90, 3, 280, 0, 20, 0))
TOGETHER = {"of_heads": ("sinks", "alibi_slopes"), "softcap": 2.0, "window": (60, 9), "padding_dtype": torch.float32}
CASES = OPTIONS | {"options together": TOGETHER | {"causal_alignment": "bottom_right"}}


def on_gpu(**arguments):
    """Output and log-sum-exp on the GPU, of tensors on the CPU and back there."""
    given = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with fused_mha.backend("triton"):
        result = fused_mha.varlen_attention(**given, return_lse=True)
    return result.output.cpu(), result.lse.cpu()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((options, torch.bfloat16) for options in CASES.values()), (CASES["options together"], torch.float32)],
    ids=[*CASES, "fp32, options together"],
)
def test_each_sequence_is_attended_to_as_if_it_were_alone(options, dtype):
    arguments = packed_call(LENGTHS, D=64, D_v=64, dtype=dtype, rest=3, **options)
    within = {name: x[:-3] for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.shape[0] > 300}
    ours = with_gradients(on_gpu, arguments | within)
    theirs = with_gradients(reference, arguments | within)
    oracle = in_fp64(arguments | within)
    assert_close_to_oracle(ours, theirs, lambda: with_gradients(reference, oracle), 420, dtype)
    output, lse = on_gpu(**arguments)
    assert not output[-3:].any()
    hidden = arguments["sinks"][:, None] if "sinks" in arguments else torch.full((4, 1), -torch.inf)
    assert torch.equal(lse[:, -3:], hidden.float().expand(4, 3))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bits_are_those_of_each_sequence_alone(dtype, is_causal):
    arguments = packed_call(LENGTHS, D=64, D_v=64, dtype=dtype, is_causal=is_causal)
    arguments = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with fused_mha.backend("triton"):
        output = fused_mha.varlen_attention(**arguments).output
    empty = [n for n, lengths in enumerate(zip(*LENGTHS, strict=True)) if 0 in lengths]
    bounds = [arguments[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    for n in set(range(len(LENGTHS[0]))) - set(empty):
        (q, q_end), (k, k_end) = (of[n : n + 2] for of in bounds)
        rows = (arguments["query"][None, q:q_end], *(arguments[name][None, k:k_end] for name in ("key", "value")))
        with fused_mha.backend("triton"):
            alone = fused_mha.attention(*rows, is_causal=is_causal).output[0]
        assert torch.equal(output[q:q_end], alone), n


def test_a_sequence_drops_what_its_element_of_a_padded_batch_drops():
    lengths = torch.tensor([70, 200, 1, 129])
    padding = torch.arange(200) >= lengths[:, None]
    rows = [torch.randn(400, 4, 64, device="cuda", requires_grad=True) for _ in range(3)]
    flags = {"is_causal": True, "dropout_p": 0.4}
    offsets, padding = cu_seqlens(lengths.tolist()).cuda(), padding.cuda()
    with fused_mha.backend("triton"):
        torch.manual_seed(3)
        found = fused_mha.varlen_attention(*rows, offsets, offsets, **flags).output
        torch.manual_seed(3)
        padded = [fused_mha.unpack(x, padding) for x in rows]
        expected = fused_mha.attention(*padded, key_padding_mask=padding, **flags).output
    expected = fused_mha.pack(expected, padding)[0]
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    gradients = [torch.autograd.grad(x, rows, cotangent) for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_host_does_not_wait_and_a_graph_takes_other_offsets():
    query, key, value = (torch.randn(512, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaf = query.clone().requires_grad_()
    offsets = torch.tensor([0, 100, 100, 512], device="cuda")

    def call():
        output = fused_mha.varlen_attention(leaf, key, value, offsets, offsets, is_causal=True).output
        return output, torch.autograd.grad(output, leaf, value)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for ends in ([0, 100, 100, 512], [0, 7, 500, 512], [0, 0, 0, 400]):
        offsets.copy_(torch.tensor(ends, device="cuda"))
        graph.replay()
        for found, expected in zip(results, call(), strict=True):
            assert torch.equal(found, expected), ends


WRONG_OFFSETS = ([0, 5, 999], [0, 20, 3], [0, -7, 22], [9, 12, 22], [2**62, -(2**62), 2**63 - 1])


@pytest.mark.parametrize("ends", WRONG_OFFSETS, ids=str)
def test_wrong_offsets_do_no_harm(ends):
    guarded = [torch.full((22 + 2 * 256, 2, 64), 7.0, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [x[256:-256].requires_grad_() for x in guarded]
    offsets = torch.tensor(ends, device="cuda")
    with fused_mha.backend("triton"):
        output = fused_mha.varlen_attention(*leaves, offsets, offsets).output
    torch.autograd.grad(output, leaves, torch.zeros_like(output))
    torch.cuda.synchronize()  # of an illegal access, it raises
    right = torch.tensor([0, 5, 22], device="cuda")
    with fused_mha.backend("triton"):
        found = fused_mha.varlen_attention(*leaves, right, right).output
    expected = one_by_one(*leaves, right, right)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "virtual keys"])
def test_nested_input_of_a_module(options, layout):
    module = fused_mha.MultiHeadAttention(128, 4, batch_first=True, device="cuda", **options)
    rows = [torch.randn(length, 128, device="cuda") for length in (7, 200, 1, 64)]
    x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
    with fused_mha.backend("triton"):
        output, _ = module(x, x, x, need_weights=False, is_causal=True)
    alone = [row.clone().requires_grad_() for row in rows]
    expected = [module(row, row, row, need_weights=False, is_causal=True)[0] for row in alone]
    torch.testing.assert_close([*output.unbind()], expected, rtol=1e-4, atol=1e-4)
    parameters = [*module.parameters()]
    found, wanted = (torch.cat([*of]).sin().sum() for of in (output.unbind(), expected))
    _, *of_parameters = torch.autograd.grad(found, [x, *parameters])
    of_rows = torch.autograd.grad(wanted, parameters)
    torch.testing.assert_close(of_parameters, [*of_rows], rtol=1e-3, atol=1e-3)


def test_compiles_without_a_break():
    arguments = packed_call(LENGTHS, D=64, D_v=64, dtype=torch.bfloat16, is_causal=True)
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")
    tensors = [arguments[name].cuda() for name in names]
    tensors[0].requires_grad_()

    def call(*tensors):
        return fused_mha.varlen_attention(*tensors, is_causal=True).output

    expected, found = call(*tensors), torch.compile(call, fullgraph=True)(*tensors)
    assert torch.equal(found, expected)
    for x, y in zip(*(torch.autograd.grad(x.sum(), tensors[0]) for x in (found, expected)), strict=True):
        assert torch.equal(x, y)

"""The formulas of docs/scaling.md, evaluated, against the bytes that two and four processes really send and keep."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fused_mha
from fused_mha.benchmark.traffic import traffic
from fused_mha.parallel import HeadwiseParallel, ring_attention

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
SIZES = {"N": 2, "L": 64, "H": 4, "H_kv": 2, "D": 8, "D_v": 6, "E": 32}
CHECKED = 512  # bytes, of which ranks see that their calls agree


def formulas(heading, row):
    """The code in the cells of a table's row."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (line,) = (line for line in section.splitlines() if line.startswith(f"| {row}"))
    return [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[2:-1]]


def evaluated(formula, R, dtype, **sizes):
    g = 8 if dtype == torch.float64 else 4
    value = eval(formula, {}, {**SIZES, **sizes, "R": R, "n": dtype.itemsize, "g": g})
    assert value == int(value)
    return int(value)


def of_ring(dtype, padding):
    """What is handed on forward and backward, and what is saved between."""
    R = dist.get_world_size()
    N, L, H, H_kv, D, D_v = (SIZES[name] for name in ("N", "L", "H", "H_kv", "D", "D_v"))
    shapes = ((N, L // R, H, D), (N, L // R, H_kv, D), (N, L // R, H_kv, D_v))
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.nbytes
        return x

    mask = torch.zeros(N, L // R, dtype=torch.bool) if padding else None
    with traffic() as forward, saved_tensors_hooks(pack, lambda x: x):
        output = ring_attention(query, key, value, key_padding_mask=mask)
    with traffic() as backward:
        output.sum().backward()
    return dict(forward), dict(backward), sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_ring_sends_and_saves_what_the_page_says(two_ranks, dtype):
    assert_is_of_the_page(two_ranks, dtype)


def test_a_ring_of_four_sends_and_saves_what_the_page_says(four_ranks):
    assert_is_of_the_page(four_ranks, torch.float32)


def assert_is_of_the_page(ranks, dtype):
    R = ranks.size
    (forward,), (backward,) = formulas("What is sent", "ring")
    _, (saved,) = formulas("What a rank keeps", "ring")
    forward, backward, saved = (evaluated(x, R, dtype) for x in (forward, backward, saved))
    expected = {"all_gather": CHECKED, "send": forward}, {"send": backward}, saved
    assert ranks.run(of_ring, dtype, False) == [expected] * R


def test_a_mask_of_padding_goes_round_with_the_keys(two_ranks):
    (more,) = re.findall(r"`key_padding_mask` goes round a ring with the keys: `([^`]+)` bytes", PAGE)
    more = evaluated(more, 2, torch.float32)
    (without, *_), (padded, *_) = (two_ranks.run(of_ring, torch.float32, padding) for padding in (False, True))
    for direction, with_mask in zip(without[:2], padded[:2], strict=True):
        assert with_mask["send"] == direction["send"] + more


def test_one_process_saves_what_the_page_says():
    N, L, H, H_kv, D, D_v = (SIZES[name] for name in ("N", "L", "H", "H_kv", "D", "D_v"))
    tensors = (torch.randn(N, L, h, d, requires_grad=True) for h, d in ((H, D), (H_kv, D), (H_kv, D_v)))
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.nbytes
        return x

    with saved_tensors_hooks(pack, lambda x: x), fused_mha.backend("cpu"):
        output = fused_mha.attention(*tensors)
    _, (formula,) = formulas("What a rank keeps", "one process")
    assert sum(saved.values()) == evaluated(formula, 1, torch.float32)
    del output


def of_heads():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    N, L, E, H = (SIZES[name] for name in ("N", "L", "E", "H"))
    module = fused_mha.MultiHeadAttention(E, H, batch_first=True, num_kv_heads=2)
    HeadwiseParallel()._apply(module, mesh)
    x = torch.randn(N, L, E, requires_grad=True)
    with traffic() as forward:
        output, _ = module(x, x, x, need_weights=False, is_causal=True)
    with traffic() as backward:
        output.sum().backward()
    with traffic() as of_weights:
        module(x, x, x)
    return dict(forward), dict(backward), of_weights["all_reduce"] - forward["all_reduce"]


def test_spread_heads_send_one_output_forward_and_one_gradient_backward(two_ranks):
    forward, backward = (evaluated(x, 2, torch.float32) for (x,) in formulas("What is sent", "heads"))
    expected = {"all_gather": CHECKED, "all_reduce": forward}, {"all_reduce": backward}
    for sent, returned, of_weights in two_ranks.run(of_heads):
        assert (sent, returned) == expected
        assert of_weights == SIZES["N"] * SIZES["L"] ** 2 * 4


def of_ddp():
    module = fused_mha.MultiHeadAttention(SIZES["E"], SIZES["H"], batch_first=True)
    handed = [0]

    def count(state, bucket):
        handed[0] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    model = DistributedDataParallel(module)
    model.register_comm_hook(None, count)
    x = torch.randn(SIZES["N"], SIZES["L"], SIZES["E"])
    output, _ = model(x, x, x)
    before = handed[0]
    output.sum().backward()
    return before, handed[0], sum(p.numel() for p in module.parameters())


def test_ddp_sends_every_gradient_once(two_ranks):
    forward, (backward,) = formulas("What is sent", "DDP")
    assert forward == []
    for before, handed, parameters in two_ranks.run(of_ddp):
        assert before == 0
        assert handed == evaluated(backward, 2, torch.float32, P=parameters)

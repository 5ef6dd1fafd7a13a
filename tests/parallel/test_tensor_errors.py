"""Wrong plans, and wrong calls of modules whose heads are spread over ranks: every rank raises."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fused_mha
from fused_mha.parallel import HeadwiseParallel
from parallel.spread_heads import MASKS, N, batch, block, spread


def bad_arguments(call, ranks):
    model = spread(block("grouped heads, rope"))
    return model(batch(), need_weights=False, **(call if dist.get_rank() in ranks else {}))


@pytest.mark.parametrize("call", [{"positions": torch.arange(3)}, {"is_causal": False}], ids=["positions", "is_causal"])
def test_another_call_on_one_rank_raises_on_both(two_ranks, call):
    for error in two_ranks.errors(bad_arguments, call, [1]):
        assert error is not None
        assert error[0] == "RuntimeError"
        assert "MultiHeadAttention must be called alike on every rank" in error[1]


def one_shorter_sequence_of_many():
    attention, x = spread(block("as torch's")).attention.requires_grad_(False), batch()[:1].expand(300, -1, -1)
    cache, padding = fused_mha.KeyValueCache(attention, 300), torch.zeros(300, x.shape[1], dtype=torch.bool)
    padding[-1, -1] = dist.get_rank() == 1
    attention(x, x, x, need_weights=False, key_padding_mask=padding, cache=cache)
    attention(x, x, x, need_weights=False, cache=cache)


def test_a_difference_is_found_however_long_the_description_is(two_ranks):
    for error in two_ranks.errors(one_shorter_sequence_of_many):
        assert error is not None
        assert "MultiHeadAttention must be called alike on every rank" in error[1]


def other_cache_on_one_rank(what):
    attention, other = (spread(block("as torch's")).attention.requires_grad_(False) for _ in range(2))
    x, is_other = batch(), dist.get_rank() == 1
    cache: object = fused_mha.KeyValueCache(
        other if what == "of another module" and is_other else attention,
        N + 1 if what == "of another batch size" and is_other else N,
    )
    if what in ("truncated", "padded"):
        padding = MASKS["padding"]["key_padding_mask"] & (what == "padded" and is_other)
        attention(x, x, x, need_weights=False, key_padding_mask=padding, cache=cache)
    if what == "truncated" and is_other:
        cache.truncate(5)
    if what in ("none", "no cache") and is_other:
        cache = None if what == "none" else {}
    attention(x, x, x, need_weights=False, cache=cache)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("none", "need_weights=False, average_attn_weights=True\n"),
        ("no cache", "cache=dict"),
        ("of another module", " of another, with [0, 0, 0, 0] tokens"),
        ("of another batch size", "cache=KeyValueCache(batch_size=5, "),
        ("truncated", " of this module, with [5, 5, 5, 5] tokens"),
        ("padded", " of this module, with [32, 20, 7, 32] tokens"),
    ],
)
def test_another_cache_on_one_rank_raises_on_both(two_ranks, what, text):
    for error in two_ranks.errors(other_cache_on_one_rank, what):
        assert error is not None
        assert error[0] == "RuntimeError"
        assert "MultiHeadAttention must be called alike on every rank" in error[1]
        assert text in error[1] + "\n"


def test_a_mask_that_is_no_tensor_is_an_error_as_on_one_device(two_ranks):
    error = ("TypeError", "attn_mask must be a Tensor, not list: torch.as_tensor makes one of an array")
    assert two_ranks.errors(bad_arguments, {"attn_mask": [1]}, [0, 1]) == [error] * 2


def no_tensor_on_one_rank():
    model, x = spread(block("as torch's")), batch()
    model.attention(x if dist.get_rank() else None, x, x)


def test_what_is_no_tensor_on_one_rank_raises_on_both(two_ranks):
    first, second = two_ranks.errors(no_tensor_on_one_rank)
    assert first == ("AttributeError", "query must be a Tensor, not NoneType")
    assert second is not None
    assert second[0] == "RuntimeError"
    assert "rank 0: AttributeError: query must be a Tensor, not NoneType" in second[1]


def other_batch_on_one_rank():
    model = spread(block("as torch's"))
    return model(batch()[: 2 + dist.get_rank()], need_weights=False)


def test_ranks_whose_inputs_differ_raise_by_name(two_ranks):
    for error in two_ranks.errors(other_batch_on_one_rank):
        assert error is not None
        assert error[0] == "RuntimeError"
        assert "MultiHeadAttention must be called alike on every rank" in error[1]
        assert "rank 1: query (3, 32, 16) float32, key (3, 32, 16) float32" in error[1]


def named_heads():
    x = batch()
    return spread(block("as torch's")).attention(x, x, x, need_weights=False, weights_of_heads=(0, 3))


def test_weights_of_named_heads_are_refused_where_they_are_spread(two_ranks):
    for error in two_ranks.errors(named_heads):
        assert error is not None
        assert error[0] == "ValueError"
        assert "weights_of_heads must be None where heads are spread over ranks" in error[1]


def bad_plan(what):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    module = fused_mha.MultiHeadAttention(
        12, 3 if what == "heads" else 4, num_kv_heads=1 if what == "key heads" else None
    )
    if what == "not ours":
        module = nn.MultiheadAttention(12, 4)
    elif what == "no such dimension":
        mesh = mesh["heads"]
    elif what == "two dimensions":
        mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    elif what == "replaced":
        module.out_proj = nn.Sequential(module.out_proj)
    elif what == "pruned":
        nn.utils.prune.random_unstructured(module, "in_proj_weight", amount=0.5)
    HeadwiseParallel()._apply(module, mesh)
    x = torch.zeros(2, 5, 12)
    return module(x, x, x, attn_mask=torch.zeros(10, 2, 2))


ERRORS = {
    "heads": ("ValueError", "num_heads must be a multiple of the 2 ranks that share the heads; got 3"),
    "key heads": ("ValueError", "num_kv_heads must be a multiple of the 2 ranks that share the heads; got 1"),
    "not ours": ("TypeError", "HeadwiseParallel is for a fused_mha.MultiHeadAttention, which fused_mha.convert makes"),
    "no such dimension": ("KeyError", "heads"),
    "two dimensions": ("ValueError", "group must be a mesh of one dimension; got one of 2, ('data', 'tensor')"),
    "replaced": ("ValueError", "out_proj must be as the module was built, neither hooked nor replaced"),
    "pruned": ("ValueError", "the module must have its projections as it was built, neither pruned nor reparametrized"),
    "mask of this rank's heads": (
        "RuntimeError",
        "attn_mask must be one for all heads, or of all 4 heads of all ranks",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_plan_that_does_not_fit_is_refused_on_every_rank(two_ranks, what):
    expected, text = ERRORS[what]
    for error in two_ranks.errors(bad_plan, what):
        assert error is not None
        assert error[0] == expected
        assert text in error[1]

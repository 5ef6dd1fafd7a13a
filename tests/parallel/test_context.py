"""Modules over a sharded sequence, on two processes against one process on the whole sequence."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_mha
from closeness import assert_close_to_oracle
from fused_mha.parallel import HeadwiseParallel, context_parallel, shard, unshard

E, H, N, L = 32, 4, 2, 64
OPTIONS = {
    "as torch's": {},
    "grouped heads, rope": {"num_kv_heads": 2, "rope": fused_mha.RotaryEmbedding(8)},
    "norm, sinks, gate, softcap": {"qk_norm": "rms", "sinks": True, "gate": True, "softcap": 5.0, "num_kv_heads": 1},
    "dropout": {"dropout": 0.25, "rope": fused_mha.RotaryEmbedding(8)},
    "sequence first": {"batch_first": False, "rope": fused_mha.RotaryEmbedding(8)},
    "unbatched": {"rope": fused_mha.RotaryEmbedding(8)},
}


def module(options, dtype=torch.float32):
    torch.manual_seed(0)
    return fused_mha.MultiHeadAttention(E, H, **{"batch_first": True, **OPTIONS[options]}).to(dtype)


def inputs(options, dtype=torch.float32):
    """Input, mask of padding and cotangent of the whole sequence, and the dimension that it runs along."""
    generator = torch.Generator().manual_seed(1)
    x, cotangent = torch.randn(2, N, L, E, generator=generator).to(dtype)
    padding = torch.arange(L) >= torch.tensor([[L], [50]])
    if options == "unbatched":
        return x[1], padding[1], cotangent[1], 0
    if options == "sequence first":
        return x.transpose(0, 1).contiguous(), padding, cotangent.transpose(0, 1), 0
    return x, padding, cotangent, 1


def gradients(model, x, padding, cotangent):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    output, weights = model(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)
    assert weights is None
    output.backward(cotangent)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "input": x.grad} | grads


def of_whole(options, dtype=torch.float32):
    return gradients(module(options, dtype), *inputs(options, dtype)[:3])


def of_ring(options):
    model = context_parallel(copy.deepcopy(nn.ModuleList([module(options)])))
    model = copy.deepcopy(model)[0]
    x, padding, cotangent, dim = inputs(options)
    found = gradients(model, shard(x, dim=dim), shard(padding, dim=-1), shard(cotangent, dim=dim))
    for name, x in found.items():
        if name in ("output", "input"):
            found[name] = unshard(x, dim=dim)
        else:
            dist.all_reduce(x)
    assert list(model.state_dict()) == list(module(options).state_dict())
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_a_module_over_a_ring_gives_what_one_process_gives(two_ranks, options):
    first, second = two_ranks.run(of_ring, options)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close_to_oracle(first, of_whole(options), lambda: of_whole(options, torch.float64), terms=N * L * E)


def revert():
    return fused_mha.revert(context_parallel(fused_mha.MultiHeadAttention(E, H)))


def test_a_module_over_a_ring_is_not_reverted(two_ranks):
    text = "(root) attends over a sequence that is sharded over ranks, which torch.nn.MultiheadAttention can't"
    assert two_ranks.errors(revert) == [("ValueError", f"{text}; nothing was changed")] * 2


def explain(how):
    model = fused_mha.MultiHeadAttention(E, H)
    if how == "ring":
        context_parallel(model)
    else:
        HeadwiseParallel()._apply(model, dist.device_mesh.init_device_mesh("cpu", (2,)))
    return fused_mha.explain(model, torch.zeros(8, 2, E))


@pytest.mark.parametrize("how", ["ring", "heads"])
def test_a_module_over_ranks_is_not_explained(two_ranks, how):
    text = "module must be of one process; got one whose sequence or heads are spread over ranks"
    assert two_ranks.errors(explain, how) == [("TypeError", text)] * 2


def bad_call(what):
    rope = fused_mha.RotaryEmbedding(8)
    made_with = {
        "window": {"window": (4, None)},
        "alibi": {"alibi": True},
        "add_bias_kv, add_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    }
    if what == "nothing to do":
        return context_parallel(nn.Linear(2, 2))
    model = fused_mha.MultiHeadAttention(E, H, batch_first=True, **made_with.get(what, {"rope": rope}))
    context_parallel(model)
    x = torch.zeros(2, 8, E if what != "embedding of one rank" or dist.get_rank() else E + 1)
    call = {"need_weights": what == "weights"}
    if what == "mask":
        call["attn_mask"] = torch.zeros(8, 8)
    elif what == "cache":
        call["cache"] = fused_mha.KeyValueCache(model, 2)
    elif what == "named heads":
        call["weights_of_heads"] = (0,)
    elif what == "nested":
        x = torch.nested.as_nested_tensor([x[0], x[1]])
    elif what == "positions":
        call["positions"] = torch.zeros(3, dtype=torch.long)
    return model(None if what == "no query on one rank" and not dist.get_rank() else x, x, x, **call)


ERRORS = {
    "nothing to do": "model must have a fused_mha.MultiHeadAttention in it; got Linear without one",
    "window": "a ring knows no window, which a module of the model has",
    "alibi": "a ring knows no alibi",
    "add_bias_kv, add_zero_attn": "a ring knows no add_bias_kv and no add_zero_attn",
    "weights": "need_weights must be False over a sharded sequence",
    "mask": "attn_mask must be None over a sharded sequence",
    "cache": "cache must be None over a sharded sequence",
    "named heads": "weights_of_heads must be None over a sharded sequence",
    "nested": "query must be a strided tensor over a sharded sequence; got a nested one",
    "positions": "positions must have shape (L) = (8,) or (N, L) = (2, 8); got (3,)",
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_a_ring_cannot_do_is_refused_on_every_rank(two_ranks, what):
    for error in two_ranks.errors(bad_call, what):
        assert error is not None
        assert error[0] == "ValueError"
        assert ERRORS[what] in error[1]


@pytest.mark.parametrize(
    ("what", "error"), [("embedding of one rank", "AssertionError"), ("no query on one rank", "AttributeError")]
)
def test_an_error_of_one_rank_reaches_the_others(two_ranks, what, error):
    first, second = two_ranks.errors(bad_call, what)
    assert first[0] == error
    assert second == ("RuntimeError", second[1])
    assert f"rank 0: {error}: {first[1]}" in second[1]

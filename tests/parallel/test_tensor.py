"""Modules whose heads are spread over ranks, alone and beside FSDP2, against the module on one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.utils.prune
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import fused_mha
from closeness import assert_close_to_oracle
from fused_mha.backends.arguments import draw_seed, heads_of_a_longer_call
from fused_mha.parallel import HeadwiseParallel, context_parallel, shard, unshard

E, H, N, L = 16, 4, 4, 32
OPTIONS = {
    "as torch's": {},
    "no bias": {"bias": False},
    "own sizes": {"kdim": 12, "vdim": 10},
    "grouped heads, rope": {"num_kv_heads": 2, "rope": fused_mha.RotaryEmbedding(4)},
    "every other option": {
        "num_kv_heads": 2,
        "value_head_dim": 3,
        "qk_norm": "layer",
        "sinks": True,
        "gate": True,
        "alibi": True,
        "softcap": 5.0,
        "window": (3, None),
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
    "dropout": {"dropout": 0.25},
}
MASKS = {
    "no mask": {},
    "padding": {"key_padding_mask": torch.arange(L) >= torch.tensor([[L], [20], [7], [L]])},
    "mask of heads": {"attn_mask": torch.arange(N * H * L * L).view(N * H, L, L) % 7 == 0},
    "float mask of each head": {"attn_mask": torch.linspace(-1, 1, H * L * L).view(1, H, L, L)},
}

each_option = pytest.mark.parametrize("options", OPTIONS)


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.attention = fused_mha.MultiHeadAttention(E, H, batch_first=True, **OPTIONS[options])

    def forward(self, x, **call):
        size = self.attention.kdim, self.attention.vdim
        key, value = (x if n == E else x[..., :n] for n in size)
        return self.attention(x, key, value, **{"is_causal": True, **call})


def block(options, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block(options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases are 0 and scales 1 at first
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-1, 1, parameter.numel()) + len(name) / 50)
    return model.to(dtype)


def batch(dtype=torch.float32):
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model, x, **call):
    """Of the mean over the batch, by the names on one device; output and weights too."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    output, weights = model(x, **call)
    loss = output.square().mean()
    results = {"output": output.detach()}
    if weights is not None:
        loss = loss + weights.square().mean()
        results["weights"] = weights.detach()
    loss.backward()
    return results | {"input": x.grad} | of_one_device(model)


def of_one_device(model):
    found = {name: full(p.grad) for name, p in model.named_parameters()}
    for part in ("weight", "bias"):
        names = [f"attention.{name}_proj_{part}" for name in "qkv"]
        if names[0] in found and (part == "bias" or model.attention._qkv_same_embed_dim):
            found[f"attention.in_proj_{part}"] = torch.cat([found.pop(name) for name in names])
    return found


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    return parallelize_module(model, mesh, {"attention": HeadwiseParallel()})


def by_heads(options, mask, call):
    return gradients(copy.deepcopy(spread(block(options))), batch(), **MASKS[mask], **call)


def assert_equals_one_process(results, options, **call):
    for other in results[1:]:
        assert set(other) == set(results[0])
        assert all(torch.equal(other[name], x) for name, x in results[0].items())

    def alone(dtype):
        return gradients(block(options, dtype), batch(dtype), **in_dtype(call, dtype))

    def in_dtype(call, dtype):
        floating = (x for x in call.items() if isinstance(x[1], torch.Tensor) and x[1].is_floating_point())
        return call | {name: x.to(dtype) for name, x in floating}

    theirs = alone(torch.float32)
    assert_close_to_oracle(results[0], theirs, lambda: alone(torch.float64), terms=N * L * E)


@each_option
def test_heads_on_two_ranks_give_what_one_process_gives(two_ranks, options):
    results = two_ranks.run(by_heads, options, "no mask", {"need_weights": False})
    assert_equals_one_process(results, options, need_weights=False)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_weights_are_those_of_all_heads(two_ranks, mask, average):
    call = {"need_weights": True, "average_attn_weights": average}
    results = two_ranks.run(by_heads, "as torch's", mask, call)
    assert_equals_one_process(results, "as torch's", **MASKS[mask], **call)


def same(state_dict, whole):
    """Whether it has the names, in their order, and the values of one device."""
    return list(state_dict) == list(whole) and all(torch.equal(full(state_dict[name]), x) for name, x in whole.items())


def through_state_dict(options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    whole, model = block(options), spread(block(options), mesh)
    assert same(model.state_dict(), whole.state_dict())
    for x in whole.parameters():
        nn.init.normal_(x)
    assert str(model.load_state_dict(whole.state_dict())) == "<All keys matched successfully>"  # of one device
    assert same(model.state_dict(), whole.state_dict())
    other = spread(block(options), mesh)
    other.load_state_dict(model.state_dict())  # of the ranks
    assert same(other.state_dict(), whole.state_dict())
    on_demand = StateDictOptions(full_state_dict=True)
    assert same(get_model_state_dict(model, options=on_demand), whole.state_dict())
    other = spread(block(options), mesh)
    set_model_state_dict(other, whole.state_dict(), options=on_demand)
    assert same(other.state_dict(), whole.state_dict())
    torch.manual_seed(0)
    drawn = Block(options)
    torch.manual_seed(0)
    model.attention.reset_parameters()
    assert same(model.state_dict(), drawn.state_dict())
    return sum(p.to_local().numel() for p in model.parameters())


@each_option
def test_the_state_dict_is_that_of_one_device(two_ranks, options):
    first, second = two_ranks.run(through_state_dict, options)
    shared = ("out_proj.bias", "norm")
    whole = dict(block(options).named_parameters())
    expected = sum(x.numel() // (1 if any(s in name for s in shared) else 2) for name, x in whole.items())
    assert first == second == expected


def load_what_does_not_fit(what):
    model = spread(block("as torch's"))
    before = {name: full(x).clone() for name, x in model.state_dict().items()}
    state_dict = block("as torch's").state_dict()
    if what == "missing":
        del state_dict["attention.in_proj_weight"]
    else:
        state_dict["attention.in_proj_weight"] = torch.zeros(3, 3)
    try:
        model.attention.load_state_dict({name.removeprefix("attention."): x for name, x in state_dict.items()})
    finally:
        assert all(torch.equal(full(x), before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("missing", 'Missing key(s) in state_dict: "in_proj_weight".'),
        ("shape", "in_proj_weight must have shape (48, 3); got (3, 3)"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(two_ranks, what, text):
    for error in two_ranks.errors(load_what_does_not_fit, what):
        assert error is not None
        assert error[0] == "RuntimeError"
        assert text in error[1]


def on_two_dimensions(options, folder):
    """FSDP2 over two pairs of ranks, the heads over the ranks of each pair, made without memory at first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def make():
        with torch.device("meta"):
            model = Block(options)
        spread(model, mesh["tensor"])
        for part in (model.attention, model):
            fully_shard(part, mesh=mesh["data"])
        model.to_empty(device="cpu")
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    model.load_state_dict(block(options).state_dict())
    assert same(model.state_dict(), block(options).state_dict())
    x = batch().chunk(2)[mesh.get_local_rank("data")]
    found = gradients(model, x, need_weights=False)
    optimizer.step()
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder)
    other, other_optimizer = make()
    state, of_optimizer = get_state_dict(other, other_optimizer)
    loaded = {"model": state, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for each, its in ((model, optimizer), (other, other_optimizer)):
        its.zero_grad()
        gradients(each, x, need_weights=False)
        its.step()
    whole = StateDictOptions(full_state_dict=True)
    trained, again = (get_model_state_dict(each, options=whole) for each in (model, other))
    assert same(again, trained)
    return mesh.get_coordinate(), found, trained


@pytest.mark.parametrize("options", ["grouped heads, rope", "every other option"])
def test_fsdp_beside_heads_on_a_mesh_of_two_dimensions(four_ranks, options, tmp_path):
    results = four_ranks.run(on_two_dimensions, options, str(tmp_path))
    firsts = [found for (_, tensor), found, _ in results if tensor == 0]
    for (data, _), found, trained in results:
        assert all(torch.equal(found[name], firsts[data][name]) for name in found)
        assert all(torch.equal(x, results[0][2][name]) for name, x in trained.items())
    ours = {name: torch.cat([found[name] for found in firsts]) for name in ("output",)}
    ours["input"] = torch.cat([found["input"] for found in firsts]) / 2  # of a mean over half the batch each
    assert_equals_one_process([firsts[0] | ours], options, need_weights=False)
    saved = {"model": block(options).state_dict()}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(saved, checkpoint_id=str(tmp_path), no_dist=True)
    block(options).load_state_dict(saved["model"])


def ring_beside_heads(options):
    """A sequence over two pairs of ranks, the heads over the ranks of each pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    model = context_parallel(spread(block(options), mesh["tensor"]), mesh["context"])
    part = mesh["context"]
    found = gradients(model, shard(batch(), part), need_weights=False)
    whole = {name: unshard(found.pop(name), part) for name in ("output", "input")}
    for x in found.values():
        dist.all_reduce(x, group=part.get_group())
    return {name: x / 2 for name, x in found.items()} | whole | {"input": whole["input"] / 2}


@pytest.mark.parametrize("options", ["grouped heads, rope", "dropout"])
def test_a_ring_beside_heads_on_a_mesh_of_two_dimensions(four_ranks, options):
    assert_equals_one_process(four_ranks.run(ring_beside_heads, options), options, need_weights=False)


def decode(options):
    """A prompt and then token by token, by a cache of this rank's heads alone."""
    model = spread(block(options)).attention.eval()
    cache = fused_mha.KeyValueCache(model, N)
    x = batch()
    parts = (x[:, :20], *x[:, 20:].split(1, dim=1))
    with torch.inference_mode():
        steps = [model(part, part, part, is_causal=True, need_weights=False, cache=cache)[0] for part in parts]
        whole = model(x, x, x, is_causal=True, need_weights=False)[0]
    return torch.cat(steps, 1), whole


def test_decoding_keeps_the_heads_of_each_rank(two_ranks):
    for steps, whole in two_ranks.run(decode, "grouped heads, rope"):
        torch.testing.assert_close(steps, whole)


def test_dropout_of_spread_heads_is_refused_where_it_would_be_another():
    with heads_of_a_longer_call(2, 4), pytest.raises(RuntimeError, match="on the CPU alone so far; got meta"):
        draw_seed(0.5, torch.device("meta"))


def nested(need_weights, learns):
    """Of sequences in tensors that were made after one more on the second rank."""
    modules = block("as torch's").attention, spread(block("as torch's")).attention
    results = []
    for layout in (torch.strided,) if need_weights else (torch.strided, torch.jagged):
        for _ in range(1 + dist.get_rank()):
            x = torch.nested.nested_tensor([*batch()[0].split([3, 0, 20, 9])], layout=layout)
        with torch.set_grad_enabled(learns):
            for module in modules:
                output, weights = module(x, x, x, need_weights=need_weights)
                results.append((torch.cat([*output.unbind()]).detach(), weights))
    return results


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(("need_weights", "learns"), [(False, False), (False, True), (True, False)])
def test_spread_heads_take_nested_input(two_ranks, need_weights, learns):
    for results in two_ranks.run(nested, need_weights, learns):
        for expected, ours in zip(results[::2], results[1::2], strict=True):
            torch.testing.assert_close(ours, expected)


def copied_after_backward():
    model = spread(block("as torch's"))
    before = gradients(model, batch(), need_weights=False)
    twin = copy.deepcopy(model)
    return before, of_one_device(twin)


def test_a_model_of_spread_heads_is_copied_with_its_gradients(two_ranks):
    for before, copied in two_ranks.run(copied_after_backward):
        for name, gradient in copied.items():
            torch.testing.assert_close(gradient, before[name], rtol=0, atol=0)


def bad_arguments(call, ranks):
    model = spread(block("grouped heads, rope"))
    return model(batch(), need_weights=False, **(call if dist.get_rank() in ranks else {}))


def test_other_positions_on_one_rank_raise_on_both(two_ranks):
    for error in two_ranks.errors(bad_arguments, {"positions": torch.arange(3)}, [1]):
        assert error is not None
        assert error[0] == "RuntimeError"
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

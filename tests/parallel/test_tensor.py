"""Modules whose heads are spread over ranks, alone and beside FSDP2, against the module on one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_mha
from closeness import assert_close_to_oracle
from fused_mha.backends.arguments import draw_seed, heads_of_a_longer_call
from fused_mha.parallel import context_parallel, shard, unshard
from parallel.spread_heads import MASKS, OPTIONS, Block, E, L, N, batch, block, full, same, spread


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


@pytest.mark.parametrize("options", OPTIONS)
def test_heads_on_two_ranks_give_what_one_process_gives(two_ranks, options):
    results = two_ranks.run(by_heads, options, "no mask", {"need_weights": False})
    assert_equals_one_process(results, options, need_weights=False)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_weights_are_those_of_all_heads(two_ranks, mask, average):
    call = {"need_weights": True, "average_attn_weights": average}
    results = two_ranks.run(by_heads, "as torch's", mask, call)
    assert_equals_one_process(results, "as torch's", **MASKS[mask], **call)


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

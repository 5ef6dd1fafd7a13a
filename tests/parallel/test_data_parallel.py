"""DDP and FSDP2 over a module of ours, on two processes, against one process on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_mha
from closeness import assert_close_to_oracle

E, H, N, L = 16, 4, 4, 6
OPTIONS = {
    "as torch's": {},
    "grouped heads, rope": {"num_kv_heads": 2, "rope": fused_mha.RotaryEmbedding(4)},
    "every other option": {
        "num_kv_heads": 1,
        "qk_norm": "layer",
        "sinks": True,
        "gate": True,
        "alibi": True,
        "softcap": 5.0,
        "window": (3, None),
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
}

each_option = pytest.mark.parametrize("options", OPTIONS)


class Block(nn.Module):
    """Causal self-attention with a residual connection."""

    def __init__(self, options):
        super().__init__()
        self.attention = fused_mha.MultiHeadAttention(E, H, batch_first=True, **OPTIONS[options])

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False, is_causal=True)[0]


def block(options, dtype=torch.float32):
    torch.manual_seed(0)
    return Block(options).to(dtype)


def batch(dtype=torch.float32):
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(1)).to(dtype)


def of_this_rank(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def gradients(model, x):
    """Of the mean over the batch, by name, and the output."""
    output = model(x)
    output.float().square().mean().backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"output": output.detach()} | {name: full(grad) for name, grad in grads.items()}


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def sharded(options, mesh=None, **policy):
    """A model that is made without memory, sharded, and only then has some."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = Block(options)
    fully_shard(model.attention, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    return model.to_empty(device="cpu")


def assert_equals_one_process(results, options, dtype=torch.float32):
    results = [dict(result) for result in results]
    ours = {"output": torch.cat([result.pop("output") for result in results]), **results[0]}
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)
    theirs = gradients(block(options, dtype), batch(dtype))

    def exact():
        return gradients(block(options).double(), batch().double())

    assert_close_to_oracle(ours, theirs, exact, terms=N * L * E, dtype=dtype)


def by_ddp(options):
    return gradients(DistributedDataParallel(block(options)), of_this_rank(batch()))


def by_fsdp(options, param_dtype):
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model = sharded(options, mp_policy=policy)
    set_model_state_dict(model, block(options).state_dict(), options=StateDictOptions(full_state_dict=True))
    return gradients(model, of_this_rank(batch()))


@each_option
def test_ddp_gives_the_gradients_of_one_process(two_ranks, options):
    assert_equals_one_process(two_ranks.run(by_ddp, options), options)


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "mixed"])
def test_fsdp_gives_the_gradients_of_one_process(two_ranks, options, dtype):
    assert_equals_one_process(two_ranks.run(by_fsdp, options, dtype), options, dtype)


def train_and_save(options, folder):
    """One step; the whole state_dict then, that of the rank that loads it, and its optimizer's."""
    model = sharded(options)
    model.attention.reset_parameters()
    drawn = {name: full(p.detach()).clone() for name, p in model.attention.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    gradients(model, of_this_rank(batch()))
    optimizer.step()
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder)

    other = sharded(options)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    state, of_optimizer = get_state_dict(other, other_optimizer)
    loaded = {"model": state, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for each, its in ((model, optimizer), (other, other_optimizer)):
        its.zero_grad()
        gradients(each, of_this_rank(batch()))
        its.step()
    whole = StateDictOptions(full_state_dict=True)
    return drawn, *(copy.deepcopy(get_model_state_dict(each, options=whole)) for each in (model, other))


@each_option
def test_a_distributed_checkpoint_is_one_of_one_process(two_ranks, options, tmp_path):
    (drawn, trained, loaded), _ = two_ranks.run(train_and_save, options, str(tmp_path))
    assert list(trained) == list(loaded) == list(block(options).state_dict())
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    alone = {"model": block(options).state_dict()}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(alone, checkpoint_id=str(tmp_path), no_dist=True)
    block(options).load_state_dict(alone["model"])
    for name, parameter in block(options).attention.named_parameters():  # other draws, of the same distribution
        limit = 1.5 * parameter.abs().max()
        assert drawn[name].abs().max() <= limit, name
        assert (drawn[name].min() < drawn[name].max()) == (parameter.min() < parameter.max()), name

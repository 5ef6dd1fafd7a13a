"""The `state_dict` of a module whose heads are spread over ranks: that of one device."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from parallel.spread_heads import OPTIONS, Block, block, full, same, spread


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


@pytest.mark.parametrize("options", OPTIONS)
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

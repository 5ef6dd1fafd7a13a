"""Deviation 4: hooked, replaced, wrapped, pruned and parametrized projections take effect in every mode."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_mha
from calls import Doubled
from fused_mha import MultiHeadAttention
from fused_mha.module.multi_head_attention import keep_forward_called

MODES = pytest.mark.parametrize(
    ("training", "grad"), [(True, True), (False, True), (False, False)], ids=["training", "eval", "inference"]
)
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def _module() -> MultiHeadAttention:
    torch.manual_seed(1)
    return MultiHeadAttention(8, 2, batch_first=True)


def _call(module: nn.Module, training: bool, grad: bool, **arguments) -> Tensor:
    with torch.set_grad_enabled(grad):
        return module.train(training)(X, X, X, **arguments)[0]


def _plain_linear(module: MultiHeadAttention) -> None:
    linear = nn.Linear(8, 8)
    linear.load_state_dict(module.out_proj.state_dict())
    module.out_proj = linear


class LoRALinear(nn.Module):
    """A frozen linear map with a learned update of rank 2, as PEFT wraps one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@MODES
def test_hooks_on_the_module_run(training, grad):
    module, calls = _module(), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    _call(module, training, grad)
    assert calls == ["before", "after"]


@MODES
def test_hook_on_out_proj_changes_the_output(training, grad):
    module = _module()
    expected = _call(module, training, grad)
    handle = module.out_proj.register_forward_hook(lambda _, args, output: output * 2)
    torch.testing.assert_close(_call(module, training, grad), expected * 2)
    handle.remove()
    assert torch.equal(_call(module, training, grad), expected)


@MODES
def test_out_proj_reads_the_merged_heads_in_the_layout_of_the_output(training, grad):
    module, seen = _module(), []
    module.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    _call(module, training, grad)
    assert seen == [X.shape]


@MODES
def test_replaced_out_proj_takes_effect(training, grad):
    module = _module()
    expected = _call(module, training, grad)
    _plain_linear(module)
    torch.testing.assert_close(_call(module, training, grad), expected)
    module.out_proj = nn.Sequential(module.out_proj, nn.Tanh())
    torch.testing.assert_close(_call(module, training, grad), expected.tanh())
    module.out_proj = nn.Linear(8, 3)
    assert _call(module, training, grad).shape == (3, 5, 3)


@MODES
def test_replaced_forward_of_out_proj_takes_effect(training, grad):
    module = _module()
    module.out_proj.forward = torch.zeros_like
    assert torch.equal(_call(module, training, grad), torch.zeros_like(X))


@MODES
def test_lora_wrapped_out_proj_takes_effect_and_learns(training, grad):
    module = _module()
    expected = _call(module, training, grad)
    module.requires_grad_(False)
    module.out_proj = LoRALinear(module.out_proj)
    merged = copy.deepcopy(module.out_proj.base)
    output = _call(module, training, grad)
    with torch.no_grad():
        merged.weight += module.out_proj.up.weight @ module.out_proj.down.weight
    assert not torch.allclose(output, expected)
    module_with_merged = _module()
    module_with_merged.out_proj = merged
    torch.testing.assert_close(output, _call(module_with_merged, training, grad))
    if grad:
        output.sum().backward()
        trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert trained == {"out_proj.down.weight", "out_proj.up.weight"}


@MODES
def test_wrapped_out_proj_takes_effect_inside_an_encoder_layer(training, grad):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    fused_mha.convert(layer)
    with torch.set_grad_enabled(grad):
        before = layer(X)
        layer.self_attn.out_proj = LoRALinear(layer.self_attn.out_proj)
        assert not torch.allclose(layer(X), before)


@MODES
@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_pruned_weights_count_as_zero(name, training, grad):
    module, dense = _module(), _module()
    owner = module.out_proj if name.startswith("out_proj") else module
    prune.random_unstructured(owner, name.rpartition(".")[2], amount=0.5)
    with torch.no_grad():
        dense.get_parameter(name).copy_(getattr(owner, name.rpartition(".")[2]))
    output = _call(module, training, grad)
    torch.testing.assert_close(output, _call(dense, training, grad))
    assert not torch.equal(output, _call(_module(), training, grad))


@MODES
def test_pruning_follows_the_weight_under_it(training, grad):
    module = _module()
    prune.l1_unstructured(module.out_proj, "weight", amount=0.5)
    before = _call(module, training, grad)
    with torch.no_grad():
        module.out_proj.weight_orig.mul_(2.0)
        module.out_proj.bias.mul_(2.0)
    torch.testing.assert_close(_call(module, training, grad), before * 2)


@MODES
@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_parametrization_takes_effect(name, training, grad):
    module, dense = _module(), _module()
    with torch.no_grad():
        for parameter in (module.get_parameter(name), dense.get_parameter(name)):
            parameter.add_(1.0)
        dense.get_parameter(name).mul_(2.0)
    owner = module.out_proj if name.startswith("out_proj") else module
    parametrize.register_parametrization(owner, name.rpartition(".")[2], Doubled())
    assert isinstance(module, MultiHeadAttention)
    torch.testing.assert_close(_call(module, training, grad), _call(dense, training, grad))


@MODES
def test_weight_norm_takes_effect(training, grad):
    module, expected = _module(), _call(_module(), training, grad)
    parametrizations.weight_norm(module, "in_proj_weight")
    torch.testing.assert_close(_call(module, training, grad), expected)
    with torch.no_grad():
        module.parametrizations.in_proj_weight.original0.zero_()  # the norms
    torch.testing.assert_close(_call(module, training, grad), module.out_proj.bias.expand_as(X))
    if grad:
        _call(module, training, grad).sum().backward()
        assert module.parametrizations.in_proj_weight.original0.grad is not None


@MODES
def test_parameters_may_be_replaced_by_plain_tensors(training, grad):
    module, dense = _module(), _module()
    doubled = module.in_proj_weight.detach() * 2
    with torch.no_grad():
        dense.in_proj_weight.mul_(2.0)
    del module.in_proj_weight
    module.in_proj_weight = doubled
    torch.testing.assert_close(_call(module, training, grad), _call(dense, training, grad))


@pytest.mark.parametrize("need_weights", [True, False])
def test_global_hooks_see_the_module_and_its_out_proj(need_weights):
    module, seen = _module(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, output: seen.append(m))
    try:
        _call(module, False, False, need_weights=need_weights)
    finally:
        handle.remove()
    assert seen == [module.out_proj, module]


def test_full_backward_hook_on_out_proj_runs():
    module, seen = _module(), []
    module.out_proj.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append(grad_output[0].shape))
    _call(module, True, True).sum().backward()
    assert seen == [X.shape]


def test_our_hook_is_registered_once_through_copies_and_conversions():
    module = _module()
    foreign = module.register_forward_pre_hook(lambda *_: None)
    model = nn.Sequential(module)
    fused_mha.convert(model)
    fused_mha.convert(model)
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
    module.__setstate__(dict(state))
    foreign.remove()
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(module))))):
        assert list(twin._forward_pre_hooks.values()) == [keep_forward_called]
    fused_mha.revert(model)
    assert not module._forward_pre_hooks
    fused_mha.convert(model)
    assert list(module._forward_pre_hooks.values()) == [keep_forward_called]


def test_pickle_of_a_converted_module_names_our_hook_and_not_a_copy():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fused_mha.convert(layer)
    twin = pickle.loads(pickle.dumps(layer))
    assert type(twin.self_attn) is MultiHeadAttention
    assert next(iter(twin.self_attn._forward_pre_hooks.values())) is keep_forward_called
    with torch.no_grad():
        assert torch.equal(twin(X), layer(X))

"""What a module's one call saves for its backward, and the backwards that are given or find something unusual."""

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.testing._internal.two_tensor import TwoTensor

import fused_mha
from calls import random_module
from fused_mha import MultiHeadAttention


def draw(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("name", ["input", "in_proj_weight", "out_proj.weight"])
def test_a_tensor_that_is_changed_before_the_backward_is_noticed(name, one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8, requires_grad=True)
    output = module(x, x, x)[0]
    with torch.no_grad():
        (x if name == "input" else module.get_parameter(name)).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("frozen", [[], ["in_proj_weight"]], ids=["all trained", "in_proj frozen"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_what_no_gradient_reads_may_be_changed_before_the_backward(frozen, need_weights, one_calls):
    module = random_module()
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    features = draw(2, 5, 8)

    def gradients(change):
        x, padding = features.clone(), torch.zeros(2, 5, dtype=torch.bool)
        padding[:, 3] = True
        output, _ = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        if change:
            with torch.no_grad():
                padding.fill_(False)
                changed = [module.in_proj_bias, module.out_proj.bias, x if frozen else module.in_proj_weight]
                before = [y.clone() for y in changed]
                for y in changed:
                    y.add_(1.0)
        found = torch.autograd.grad(output.square().sum(), trained)
        if change:
            with torch.no_grad():
                for y, value in zip(changed, before, strict=True):
                    y.copy_(value)
        return found

    for clean, found in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(clean, found)
    assert all(one_calls)


def test_frozen_features_from_inference_mode_train_the_out_projection(one_calls):
    module = random_module()
    module.in_proj_weight.requires_grad_(False)
    module.in_proj_bias.requires_grad_(False)
    with torch.inference_mode():
        x = draw(2, 5, 8)
    module(x, x, x)[0].sum().backward()
    assert module.out_proj.weight.grad is not None
    assert all(one_calls)


def test_a_bias_that_is_changed_before_a_second_derivative_is_noticed(one_calls):
    module = random_module()
    x = draw(2, 5, 8).requires_grad_()
    output = module(x, x, x)[0]
    with torch.no_grad():
        module.in_proj_bias.add_(1.0)
    with pytest.raises(RuntimeError, match=r"in_bias.*version"):
        torch.autograd.grad(output.square().sum(), x, create_graph=True)


def test_weights_alone_give_no_gradient_to_what_they_do_not_depend_on(one_calls):
    for ours in (True, False):
        kind = MultiHeadAttention if ours else nn.MultiheadAttention
        module = kind(8, 2, kdim=6, vdim=7, add_bias_kv=True, batch_first=True)
        value = draw(2, 4, 7).requires_grad_()
        _, weights = module(draw(2, 5, 8), draw(2, 4, 6), value)
        weights.square().sum().backward()
        without = {name for name, p in module.named_parameters() if p.grad is None}
        assert without == {"v_proj_weight", "bias_v", "out_proj.weight", "out_proj.bias"}
        assert value.grad is None
        for p in module.parameters():
            p.requires_grad_(False)
        assert not module(draw(2, 5, 8), draw(2, 4, 6), value)[1].requires_grad


class TestGradientsThatAreNoPlainTensors:
    """They go through the dispatcher, as the library reads plain memory."""

    def run(self, kind, loss):
        torch.manual_seed(3)
        module = kind(8, 2, batch_first=True, dtype=torch.float64)
        x = draw(2, 4, 8).double().requires_grad_()
        loss(*module(x, x, x)).backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    @pytest.mark.parametrize("of", ["output", "weights", "attention"])
    def test_wrapper_subclasses(self, of, one_calls):
        def loss(output, weights):
            y = weights if of == "weights" else output
            factor = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            return output.sum() + (y * TwoTensor(factor, factor.clone())).sum()

        for ours, theirs in zip(self.run(MultiHeadAttention, loss), self.run(nn.MultiheadAttention, loss), strict=True):
            torch.testing.assert_close(getattr(ours, "a", ours), getattr(theirs, "a", theirs))

    def test_negated_views(self, one_calls):
        module = random_module()
        x = draw(2, 5, 8).requires_grad_()
        output, weights = module(x, x, x)
        plain = torch.autograd.grad((output, weights), x, (-torch.ones_like(output), -weights), retain_graph=True)
        negated = (torch._neg_view(torch.ones_like(output)), torch._neg_view(weights.detach()))
        assert torch.equal(plain[0], torch.autograd.grad((output, weights), x, negated)[0])

    @pytest.mark.parametrize("call", ["module", "attention", "hooked"])
    def test_batched_ones(self, call, one_calls):
        module = MultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
        if call == "hooked":
            module.out_proj.register_forward_hook(lambda *_: None)

        def function(x):
            if call == "attention":
                heads = x.unflatten(-1, (2, 4))
                return fused_mha.attention(heads, heads, heads).output
            return module(x, x, x)[0]

        x = draw(1, 3, 8).double()
        jacobian = torch.autograd.functional.jacobian
        torch.testing.assert_close(jacobian(function, x, vectorize=True), jacobian(function, x))


@pytest.mark.parametrize("layout", ["transposed", "channels last", "strided"])
def test_saved_tensors_may_come_back_in_another_layout(layout, one_calls):
    def unpack(x):
        if layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "channels last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return torch.stack((x, x), dim=-1)[..., 0]

    module, x = random_module(), draw(2, 5, 8).requires_grad_()
    expected = torch.autograd.grad(module(x, x, x)[0].square().sum(), [x, *module.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        output = module(x, x, x)[0]
    for found, clean in zip(
        torch.autograd.grad(output.square().sum(), [x, *module.parameters()]), expected, strict=True
    ):
        assert torch.equal(found, clean)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("sharing", ["self", "key is value"])
def test_compiled_autograd_gives_shared_inputs_their_gradient(sharing, one_calls):
    module = random_module()
    leaves = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(1 if sharing == "self" else 2)]
    inputs = (leaves[0], leaves[-1], leaves[-1])
    module(*inputs)[0].square().sum().backward()
    expected = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    loss = module(*inputs)[0].square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.backward()
    for x, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(x.grad, grad)


def test_what_was_exported_without_a_gradient_can_be_trained():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = random_module(dtype=torch.float64)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    net, x = Net(), draw(2, 5, 8).double()  # products in another order differ by more than fp32's default tolerance
    with torch.no_grad():
        exported = torch.export.export(net, (x,), strict=True).module()
    grads = []
    for model in (net, exported):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["key", "in_proj_weight", "in_proj_bias", "key_padding_mask"])
def test_a_tensor_whose_memory_was_freed_is_refused(name, one_calls):
    module, inputs = random_module(), [draw(2, 5, 8), draw(2, 3, 8), draw(2, 3, 8)]
    padding = torch.zeros(2, 3, dtype=torch.bool)
    freed = {"key": inputs[1], "key_padding_mask": padding}.get(name)
    freed = module.get_parameter(name) if freed is None else freed
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"no memory|out of bounds"):
        module(*inputs, key_padding_mask=padding if name == "key_padding_mask" else None)


def test_a_gradient_that_cannot_be_read_is_refused_and_nothing_is_kept(one_calls):
    module, x = random_module(), draw(2, 5, 8).requires_grad_()
    output = module(x, x, x)[0]
    before = x._use_count()
    loss = output.gather(1, torch.zeros(2, 1, 8, dtype=torch.long), sparse_grad=True).sum()
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.backward(retain_graph=True)
    assert x._use_count() == before

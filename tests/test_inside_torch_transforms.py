"""The module under torch.func, forward-mode AD, double backward and optimizers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap

import fused_mha
from calls import BACK_ENDS, WITH_WEIGHTS, forced
from closeness import assert_close_to_oracle, in_fp64
from fused_mha import MultiHeadAttention
from fused_mha.testing import Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's forward AD scripts its rules
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
]

WEIGHTS = pytest.mark.parametrize("need_weights", [True, False])
CASES = pytest.mark.parametrize(
    "case",
    [
        Case(N=3),
        Case(N=3, sharing="cross", key_padding_mask="float", attn_mask="float"),
        Case(N=3, sharing="separate", kdim=6, vdim=9, add_bias_kv=True, add_zero_attn=True),
    ],
    ids=str,
)


def _three(case: Case) -> tuple[nn.Module, nn.Module, nn.Module, tuple[Tensor, ...], dict]:
    """Ours, torch's and the oracle in fp64, on one set of inputs."""
    ours, theirs, inputs, arguments = case.build()
    return ours, theirs, copy.deepcopy(theirs).double(), inputs, arguments


def _assert_all_close_to_oracle(function, ours, theirs, oracle, *arguments) -> None:
    """`function(module, *arguments)` gives a dict of tensors; all of them are judged."""
    mine, yours = function(ours, *arguments), function(theirs, *arguments)
    terms = {name: max(x[..., 0].numel(), 16) for name, x in mine.items()}
    assert_close_to_oracle(mine, yours, lambda: function(oracle, *in_fp64(arguments)), terms)


@WEIGHTS
@CASES
def test_vmap_over_a_batch_dimension_equals_a_loop(case, need_weights):
    module, _, inputs, arguments = case._replace(need_weights=need_weights, batched=False).build()
    batched = [torch.stack([x, x * 2, x - 1, -x]) for x in inputs]
    output, weights = vmap(lambda *x: _tensors(module(*x, **arguments)), randomness="error")(*batched)
    for i in range(4):
        expected, expected_weights = module(*(x[i] for x in batched), **arguments)
        torch.testing.assert_close(output[i], expected)
        if need_weights:
            torch.testing.assert_close(weights[i], expected_weights)


def _tensors(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    output, weights = result
    return output, output if weights is None else weights


def test_vmap_over_masks_equals_a_loop():
    module, _, (query, key, _), _ = Case(sharing="cross").build()
    masks = torch.rand(3, 2, 7) < 0.5
    masks[..., 0] = False
    output = vmap(lambda mask: module(query, key, key, key_padding_mask=mask)[0])(masks)
    for i in range(3):
        torch.testing.assert_close(output[i], module(query, key, key, key_padding_mask=masks[i])[0])


def _loss(module: nn.Module, parameters: dict, inputs: tuple[Tensor, ...], arguments: dict) -> Tensor:
    output, weights = functional_call(module, parameters, inputs, arguments)
    return output.square().sum() + (0.0 if weights is None else weights.square().sum())


@WEIGHTS
@CASES
def test_func_grad_agrees_with_torch(case, need_weights):
    ours, theirs, oracle, inputs, arguments = _three(case._replace(need_weights=need_weights))

    def gradients(module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict) -> dict[str, Tensor]:
        parameters = dict(module.named_parameters())
        return grad(lambda p: _loss(module, p, inputs, arguments))(parameters)

    _assert_all_close_to_oracle(gradients, ours, theirs, oracle, inputs, arguments)


@WEIGHTS
@CASES
def test_per_sample_gradients_agree_with_torch(case, need_weights):
    case = case._replace(need_weights=need_weights, key_padding_mask=None)
    ours, theirs, oracle, inputs, arguments = _three(case)

    def gradients(module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict) -> dict[str, Tensor]:
        parameters = dict(module.named_parameters())

        def of_sample(parameters: dict, *sample: Tensor) -> Tensor:
            return _loss(module, parameters, tuple(x[None] for x in sample), arguments)

        return vmap(grad(of_sample), in_dims=(None, 0, 0, 0))(parameters, *inputs)

    _assert_all_close_to_oracle(gradients, ours, theirs, oracle, inputs, arguments)


@WEIGHTS
def test_per_sample_gradients_sum_to_the_gradient_of_the_batch(need_weights):
    module, _, inputs, arguments = Case(N=3, need_weights=need_weights, dtype=torch.float64).build()
    parameters = dict(module.named_parameters())

    def of_sample(parameters: dict, x: Tensor) -> Tensor:
        return _loss(module, parameters, (x[None],) * 3, arguments)

    per_sample = vmap(grad(of_sample), in_dims=(None, 0))(parameters, inputs[0])
    total = torch.autograd.grad(_loss(module, parameters, inputs, arguments), list(parameters.values()))
    for name, expected in zip(per_sample, total, strict=True):
        torch.testing.assert_close(per_sample[name].sum(0), expected)


@CASES
def test_jvp_with_weights_agrees_with_torch(case):
    ours, theirs, oracle, inputs, arguments = _three(case)
    torch.manual_seed(5)
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def tangent(module, inputs, tangents, arguments) -> dict[str, Tensor]:
        _, (output, weights) = jvp(lambda *x: module(*x, **arguments), inputs, tangents)
        return {"output": output, "weights": weights}

    _assert_all_close_to_oracle(tangent, ours, theirs, oracle, inputs, tangents, arguments)


@CASES
def test_jvp_without_weights_equals_that_with_weights(case):
    module, _, inputs, arguments = case._replace(dtype=torch.float64).build()
    tangents = tuple(torch.randn_like(x) for x in inputs)
    tangent_of = []
    for need_weights in (True, False):
        arguments["need_weights"] = need_weights
        tangent_of.append(jvp(lambda *x: module(*x, **arguments)[0], inputs, tangents)[1])
    assert tangent_of[0].abs().max() > 0.01
    torch.testing.assert_close(tangent_of[1], tangent_of[0])


@WEIGHTS
def test_forward_mode_ad_equals_finite_differences(need_weights):
    module, _, (x, *_), arguments = Case(need_weights=need_weights, dtype=torch.float64).build()
    direction, step = torch.randn_like(x), 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        tangent = forward_ad.unpack_dual(module(dual, dual, dual, **arguments)[0]).tangent
    ahead, behind = (module(*[x + sign * step * direction] * 3, **arguments)[0] for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step))


@WEIGHTS
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_vjp_equals_backward(need_weights, back_end):
    module, _, (x, *_), arguments = Case(need_weights=need_weights).build()
    x.requires_grad_()
    with forced(back_end, need_weights):
        output = module(x, x, x, **arguments)[0]
    cotangent = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, cotangent)
    _, pullback = vjp(lambda x: module(x, x, x, **arguments)[0], x)
    torch.testing.assert_close(pullback(cotangent)[0], expected)


@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
@CASES
def test_double_backward_with_weights_agrees_with_torch(case, back_end):
    ours, theirs, oracle, inputs, arguments = _three(case)

    def second(module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict) -> dict[str, Tensor]:
        leaves = {f"input {i}": x.detach().clone().requires_grad_() for i, x in enumerate(inputs)}
        output, weights = module(*leaves.values(), **arguments)
        wanted = {**leaves, **dict(module.named_parameters())}
        loss = output.square().sum() + weights.square().sum()
        first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return dict(zip(wanted, torch.autograd.grad(penalty, list(wanted.values())), strict=True))

    with fused_mha.backend(back_end):
        _assert_all_close_to_oracle(second, ours, theirs, oracle, inputs, arguments)


def test_double_backward_without_weights_raises_on_the_op_of_torch():
    module, _, (x, *_), _ = Case().build()
    x.requires_grad_()
    with fused_mha.backend("sdpa"):
        output, _ = module(x, x, x, need_weights=False)
    (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
def test_double_backward_without_weights_passes_gradgradcheck(back_end):
    module, _, (x, *_), _ = Case(L=3, embed_dim=4, num_heads=2, dtype=torch.float64).build()
    mask = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])  # one row is hidden everywhere

    def attend(x: Tensor) -> Tensor:
        with fused_mha.backend(back_end):
            return module(x, x, x, need_weights=False, attn_mask=mask)[0]

    x.requires_grad_()
    assert torch.autograd.gradcheck(attend, x)
    assert torch.autograd.gradgradcheck(attend, x)


@WEIGHTS
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_training_steps_agree_with_torch(optimizer, need_weights, back_end):
    ours, theirs, oracle, inputs, arguments = _three(Case(N=3, L=9, need_weights=need_weights))
    target = torch.randn(3, 9, 16)

    def losses(module: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, arguments: dict) -> dict[str, Tensor]:
        steps = optimizer(module.parameters(), lr=1e-2)
        history = []
        for _ in range(5):
            steps.zero_grad()
            loss = (module(*inputs, **arguments)[0] - target).square().mean()
            loss.backward()
            steps.step()
            history.append(loss.detach())
        assert history[-1] < history[0]
        return {"losses": torch.stack(history)}

    with forced(back_end, need_weights):
        _assert_all_close_to_oracle(losses, ours, theirs, oracle, inputs, target, arguments)


@WEIGHTS
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["in place", "through .data", "new .data", "new parameter"])
def test_changed_weights_take_effect_in_the_next_call(how, mode, need_weights):
    module = MultiHeadAttention(8, 2)
    fresh = MultiHeadAttention(8, 2)
    x = torch.randn(5, 3, 8)
    with mode():
        before, _ = module(x, x, x, need_weights=need_weights)
    for name, value in fresh.state_dict().items():
        parameter = module.get_parameter(name)
        if how == "in place":
            with torch.no_grad():
                parameter.copy_(value)
        elif how == "through .data":
            parameter.data.copy_(value)
        elif how == "new .data":
            parameter.data = value.clone()
        else:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(value.clone()))
    with mode():
        after, _ = module(x, x, x, need_weights=need_weights)
        assert torch.equal(after, fresh(x, x, x, need_weights=need_weights)[0])
    assert not torch.equal(after, before)

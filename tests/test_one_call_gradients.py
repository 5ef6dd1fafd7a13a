"""The gradient of a module's forward that was one call of the C++ library."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_mha
from calls import composed, random_module
from fused_mha import ops
from fused_mha.testing import Case, assert_parity
from fused_mha.testing.strategies import cases, seeds

from search import examples

USED = pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=["both", "output", "weights"])
LAYOUTS = {
    "batch first": {},
    "sequence first": {"batch_first": False},
    "unbatched": {"batched": False},
    "unbatched, sequence first": {"batched": False, "batch_first": False},
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def total(results, used=(True, True)):
    """A number that depends on everything that is used in another way."""
    generator = torch.Generator().manual_seed(5)
    parts = [(torch.randn(x.shape, generator=generator).to(x) * x).sum() for x in results if x is not None]
    return sum(part for part, is_used in zip(parts, used, strict=False) if is_used)


def gradients(module, inputs, arguments, used, create_graph=False):
    """By name, of what requires one; None where nothing depends on it."""
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    leaves |= {name: x for name, x in module.named_parameters() if x.requires_grad}
    loss = total(module(*inputs, **arguments), used)
    if not loss.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, create_graph=create_graph)
    return dict(zip(leaves, found, strict=True))


def assert_equal_gradients(ours, theirs):
    assert list(ours) == list(theirs)
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            assert ours[name].dtype == gradient.dtype
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-11)


def cases_of_fp64():
    return cases(dtypes=(torch.float64,), allow_empty=False).map(lambda case: case._replace(dropout=0.0))


def fresh(inputs, draw):
    """The inputs as leaves, one tensor staying one, some of which require a gradient."""
    memo = {}
    for x in inputs:
        if id(x) not in memo:
            memo[id(x)] = x.detach().requires_grad_(draw())
    return [memo[id(x)] for x in inputs]


@settings(suppress_health_check=list(HealthCheck))
@given(case=cases_of_fp64(), seed=seeds, data=st.data())
def test_any_part_may_be_frozen_and_any_result_unused(case, seed, data, one_calls):
    ours, _, inputs, arguments = case.build(seed=seed)
    inputs = fresh(inputs, lambda: data.draw(st.booleans()))
    for parameter in ours.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    used = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    used = used if case.need_weights else (True, False)
    create_graph = data.draw(st.booleans())
    one_calls.clear()
    with composed():
        expected = gradients(ours, inputs, arguments, used)
    found = gradients(ours, inputs, arguments, used, create_graph)
    assert_equal_gradients(found, expected)
    assert one_calls == [True]
    with composed():
        recorded = [x.requires_grad for x in ours(*inputs, **arguments) if x is not None]
    assert [x.requires_grad for x in ours(*inputs, **arguments) if x is not None] == recorded
    if create_graph:
        with fused_mha.backend("reference"):
            again = gradients(ours, inputs, arguments, used, create_graph=True)
        names = [name for name, x in again.items() if x is not None and x.requires_grad]
        leaves = [x for x in (*inputs, *ours.parameters()) if x.requires_grad]
        if names:
            second, exact = (
                torch.autograd.grad(
                    total([first[name] for name in names], [True] * len(names)), leaves, materialize_grads=True
                )
                for first in (found, again)
            )
            for mine, yours in zip(second, exact, strict=True):
                torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-9)


@USED
@each_layout
@pytest.mark.parametrize("sharing", ["self", "cross", "separate"])
def test_the_gradient_is_differentiable(sharing, layout, used, one_calls):
    case = Case(
        N=2, L=3, S=2, embed_dim=4, num_heads=2, sharing=sharing, add_bias_kv=True, dtype=torch.float64, **layout
    )
    ours, _, inputs, arguments = case._replace(average_attn_weights=False, attn_mask="float").build()
    inputs = fresh(inputs, lambda: True)
    leaves = list({id(x): x for x in inputs}.values()) + list(ours.parameters())
    index = [next(i for i, leaf in enumerate(leaves) if leaf is x) for x in inputs]

    def run(*given):
        results = ours(*(given[i] for i in index), **arguments)
        return [x for x, is_used in zip(results, used, strict=True) if is_used]

    wanted = leaves if used[0] else [x for x in leaves if all(x is not p for p in ours.out_proj.parameters())]
    wanted = [x for x in wanted if used[0] or x is not ours.bias_v]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert all(one_calls)


@each_layout
def test_results_may_be_changed_in_place(layout, one_calls):
    ours, theirs, inputs, arguments = Case(dtype=torch.float64, **layout).build()
    found = []
    for module in (ours, theirs):
        output, weights = module(*inputs, **arguments)
        output += inputs[0]
        weights.mul_(2.0)
        torch.relu_(output)
        found.append(torch.autograd.grad(total((output, weights)), list(module.parameters())))
    for mine, yours in zip(*found, strict=True):
        torch.testing.assert_close(mine, yours)
    assert one_calls == [True]


@each_layout
def test_results_are_contiguous_and_own_their_memory(layout, one_calls):
    ours, _, inputs, arguments = Case(**layout).build()
    for x in ours(*inputs, **arguments):
        assert x.is_contiguous()
        assert x.untyped_storage().nbytes() == x.nbytes


def test_weights_need_no_gradient_where_only_the_out_projection_learns(one_calls):
    module = random_module()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.out_proj.weight.requires_grad_()
    x = torch.randn(2, 5, 8)
    output, weights = module(x, x, x)
    assert (output.requires_grad, weights.requires_grad) == (True, False)
    (gradient,) = torch.autograd.grad(output.sum() + weights.sum(), module.out_proj.weight, create_graph=True)
    assert not gradient.requires_grad or gradient.grad_fn is not None
    assert one_calls == [True]


def test_nothing_is_kept_where_nothing_requires_a_gradient(one_calls):
    module = random_module().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    assert not any(y.requires_grad for y in module(x, x, x))
    with torch.no_grad():
        assert not any(y.requires_grad for y in random_module()(x, x, x))
    assert one_calls == [True, True]


@pytest.mark.parametrize(
    "shared",
    [lambda q, k: (q, k, q), lambda q, k: (q, q, k), lambda q, k: (k, q, q), lambda q, k: (q, q, q)],
    ids=["query is value", "query is key", "key is value", "all"],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_tensor_in_two_roles_gets_the_sum_of_both(shared, batch_first, one_calls):
    module = random_module(batch_first=batch_first, dtype=torch.float64)
    stock = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    stock.load_state_dict(module.state_dict())
    query, key = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    assert_parity(module, stock, *shared(query, key))
    assert all(one_calls)


@USED
def test_gradients_of_any_strides_are_taken(used, one_calls):
    module = random_module(dtype=torch.float64)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0),
        torch.randn(1, 5, 1, dtype=torch.float64).expand(3, 5, 5),
    ]

    def run(grads):
        results = [y for y, is_used in zip(module(x, x, x), used, strict=True) if is_used]
        grads = [g for g, is_used in zip(grads, used, strict=True) if is_used]
        return torch.autograd.grad(results, [x, *module.parameters()], grads, allow_unused=True)

    strided, plain = run(grads), run([g.contiguous() for g in grads])
    negative = run([torch.complex(-g, -g).conj().imag for g in grads])  # a lazily negated view
    for mine, yours, other in zip(strided, plain, negative, strict=True):
        assert (mine is yours is None) or torch.equal(mine, yours)
        assert (other is yours is None) or torch.equal(other, yours)
    assert all(one_calls)


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x[:1].expand_as(x),
        lambda x: x[..., :1].expand_as(x),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([x, x], -1)[..., 3:11],
        lambda x: torch.complex(x, -x).conj().imag,
    ],
    ids=["expanded", "expanded features", "transposed", "strided features", "slice", "lazily negated"],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_of_any_strides_give_what_contiguous_ones_give(lay_out, batch_first, one_calls):
    module = random_module(dtype=torch.float64, batch_first=batch_first)
    leaf = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for prepare in (lambda x: x, torch.Tensor.contiguous, lambda x: x.resolve_neg().contiguous()):
        x = prepare(lay_out(leaf))
        y = lay_out(leaf.detach() * 2)
        for inputs in ((x, x, x), (x, y, y), (y, x, y)):
            results = module(*inputs)
            given = torch.autograd.grad(total(results), [leaf, *module.parameters()], retain_graph=True)
            found.append([*results, *given])
    for i in range(3):
        for tensors in zip(*found[i::3], strict=True):
            for other in tensors[1:]:
                torch.testing.assert_close(tensors[0], other, rtol=1e-12, atol=1e-12)


def test_a_graph_is_freed_and_may_be_retained(one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8)
    loss = total(module(x, x, x))
    parameters = list(module.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing_changes_no_bit(use_reentrant, dropout, one_calls):
    module = random_module(dropout=dropout)
    x = torch.randn(3, 5, 8, requires_grad=True)

    def whole(x):
        return module(x, x, x)

    def checkpointed(x):
        return checkpoint(whole, x, use_reentrant=use_reentrant)

    found = []
    for function in (whole, checkpointed):
        torch.manual_seed(1)
        module.zero_grad()
        x.grad = None
        results = function(x)
        total(results).backward()
        found.append([*results, x.grad, *(parameter.grad for parameter in module.parameters())])
    assert all(map(torch.equal, *found))
    assert all(one_calls)


def test_saved_tensors_may_lie_elsewhere_meanwhile(one_calls):
    module = random_module()
    x = torch.randn(3, 5, 8)
    expected = torch.autograd.grad(total(module(x, x, x)), list(module.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = total(module(x, x, x))
    assert all(map(torch.equal, torch.autograd.grad(loss, list(module.parameters())), expected))


@pytest.mark.parametrize("sharing", ["self", "cross", "separate"])
@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
def test_dropout_is_the_compositions_and_so_is_its_gradient(sharing, p, one_calls):
    case = Case(N=30, L=40, S=33, sharing=sharing, dropout=p, dtype=torch.float64, attn_mask="bool")
    module, _, inputs, arguments = case._replace(average_attn_weights=False).build()
    inputs = fresh(inputs, lambda: True)

    def run():
        torch.manual_seed(9)
        results = module(*inputs, **arguments)
        torch.manual_seed(9)
        return results, gradients(module, inputs, arguments, (True, True))

    results, found = run()
    with composed():
        expected = run()
    assert all(map(torch.equal, results, expected[0]))
    assert_equal_gradients(found, expected[1])
    assert one_calls == [True, True]


def test_dropout_in_a_second_derivative_is_the_one_that_was_drawn(one_calls):
    module = random_module(dropout=0.5, dtype=torch.float64)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(4)
        return module(x, x, x, average_attn_weights=False)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    assert all(one_calls)


@settings(suppress_health_check=list(HealthCheck), max_examples=examples(20))
@given(case=cases(allow_empty=False), seed=seeds)
def test_the_same_call_again_gives_the_same_bits(case, seed, one_calls):
    module, _, inputs, arguments = case.build(seed=seed)
    inputs = fresh(inputs, lambda: True)
    found = []
    for garbage in (float("nan"), 1e30):
        trash = [torch.full((size,), garbage) for size in (100, 10_000, 100_000)]
        del trash
        torch.manual_seed(seed)
        found.append(gradients(module, inputs, arguments, (True, True)))
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None)
        assert gradient is None or torch.equal(gradient.nan_to_num(), found[1][name].nan_to_num())


def test_the_backward_of_the_operators_is_not_called(one_calls, monkeypatch):
    monkeypatch.setattr(ops.schema, "attention", None)
    module = random_module()
    x = torch.randn(2, 5, 8, requires_grad=True)
    total(module(x, x, x)).backward()
    assert one_calls == [True]


def test_a_mode_that_is_on_in_the_backward_alone_sees_its_operators(one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8, requires_grad=True)
    expected = torch.autograd.grad(total(module(x, x, x)), [x, *module.parameters()])
    loss = total(module(x, x, x))
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(loss, [x, *module.parameters()])
    assert counter.get_total_flops() > 0
    for mine, yours in zip(found, expected, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)
    assert one_calls == [True, True]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("way", [composed, contextlib.nullcontext], ids=["composition", "one call"])
def test_compiled_autograd_traces_the_gradient(way, one_calls):
    module = random_module()
    x = torch.randn(2, 5, 8)
    with way():
        loss = total(module(x, x, x))
    expected = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)

"""Whole modules on CUDA by torch's products and the Triton kernels, which run under Triton's interpreter here."""

import contextlib
import gc
import weakref

import pytest
import torch

import fused_mha
from module_calls import CASES, IDS, E, N, S, inputs, masks, matches_torch, modules

pytest.importorskip("triton")
from fused_mha.backends import triton
from fused_mha.backends.triton import finite, launch, launcher
from fused_mha.backends.triton import module as kept_modules
from fused_mha.core import dispatch, plans
from fused_mha.module import one_call, projections


@pytest.fixture
def served(as_on_a_gpu, monkeypatch):
    """The names of the steps of `Kept` that have served calls."""
    stands_in = dispatch.BACKENDS[0]._replace(serves_module=triton.BACKEND.serves_module)
    monkeypatch.setattr(dispatch, "BACKENDS", (stands_in, *dispatch.BACKENDS[1:]))
    monkeypatch.setattr(one_call, "forward", lambda *_, **__: None)  # of the CPU
    found = []

    def noted(name):
        step = getattr(kept_modules.Kept, name)
        monkeypatch.setattr(kept_modules.Kept, name, lambda *arguments: (found.append(name), step(*arguments))[1])

    noted("forward")
    noted("backward")
    return found


@pytest.mark.thorough(one_in=3)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_agrees_with_torch(case, served):
    matches_torch(case)
    assert served == ["forward", "backward"] * 2


def gradients(module, x, *others, **arguments):
    """Those of the input and of all parameters, after the results."""
    leaf = x.detach().requires_grad_()
    results = [y for y in module(leaf, *(others or (leaf, leaf)), **arguments) if y is not None]
    loss = sum(y.square().sum() for y in results)
    return [*results, *torch.autograd.grad(loss, [leaf, *module.parameters()], allow_unused=True)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_hidden_rows_reaches_nothing(bad, batch_first, served):
    ours, _ = modules(batch_first=batch_first)
    (x, _, _), arguments = inputs("self", batch_first), masks("padding", S, "self")
    hidden = arguments["key_padding_mask"]
    hidden = (hidden if batch_first else hidden.T).unsqueeze(-1)
    spoilt = x.masked_fill(hidden, bad)
    expected = gradients(ours, x.masked_fill(hidden, 0.0), **arguments)
    for found, right in zip(gradients(ours, spoilt, **arguments), expected, strict=True):
        assert torch.equal(found, right)
    assert torch.isnan(spoilt).any() or torch.isinf(spoilt).any()  # the caller's tensor is as it was


def test_what_is_not_finite_elsewhere_is_not_hidden(served):
    ours, _ = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    x[0, 0, 0] = float("nan")
    output, _ = ours(x, x, x, **masks("padding", S, "self"))
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("frozen", ["in_proj_weight", "input", "all but out_proj"])
def test_any_part_may_be_frozen(frozen, served):
    results = []
    for module in modules(batch_first=True):
        (x, _, _), arguments = inputs("self", True), masks("padding", S, "self")
        x.requires_grad_(frozen not in ("input", "all but out_proj"))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name != frozen and (frozen != "all but out_proj" or name.startswith("out_proj")))
        output, weights = module(x, x, x, **arguments)
        assert weights.requires_grad == (frozen != "all but out_proj")
        output.square().sum().backward()
        results.append([None if y.grad is None else y.grad for y in (x, *module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_a_gradient_of_the_weights_alone(served):
    ours, theirs = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    for module in (ours, theirs):
        module(x, x, x)[1].square().sum().backward()
    assert ours.out_proj.weight.grad is None
    torch.testing.assert_close(ours.in_proj_weight.grad, theirs.in_proj_weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_backward_under_autocast_is_that_of_the_forward_outside_it(dtype, served):
    ours = modules(batch_first=True)[0].to(dtype)
    x, arguments = inputs("self", True)[0].to(dtype).requires_grad_(), masks("padding", S, "self")
    leaves, found = [x, *ours.parameters()], []
    for casts in (False, True):
        output, _ = ours(x, x, x, need_weights=False, **arguments)
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            found.append(torch.autograd.grad(output, leaves, torch.ones_like(output)))
    assert all(map(torch.equal, *found))
    assert served == ["forward", "backward"] * 2


def test_every_kernel_is_launched_on_the_device_of_its_tensors(served, monkeypatch):
    inside, launched = [], []

    @contextlib.contextmanager
    def on_device(index):
        inside.append(index)
        yield
        inside.pop()

    launch_one = launcher.Launcher.__call__
    monkeypatch.setattr(launch, "on_device", on_device)
    monkeypatch.setattr(finite, "on_device", on_device)
    monkeypatch.setattr(
        launcher.Launcher,
        "__call__",
        lambda self, *given: (launched.append((self.kernel.fn.__name__, len(inside))), launch_one(self, *given))[1],
    )
    ours, _ = modules(batch_first=True)
    gradients(ours, inputs("self", True)[0], **masks("padding", S, "self"))
    kernels = {"finite_where_hidden", "forward", "weights", "grad_query", "grad_key_value"}
    assert set(launched) == {(name, 1) for name in kernels}


def test_a_second_derivative_is_right(served):
    found = []
    for module in modules(batch_first=True):
        x = inputs("self", True)[0].requires_grad_()
        output, _ = module(x, x, x)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_dropout_is_the_same_in_the_backward_and_in_every_call_of_one_seed(served):
    ours, _ = modules(batch_first=True, dropout=0.5)
    (x, _, _), arguments = inputs("self", True), {"need_weights": False}

    def run():
        torch.manual_seed(4)
        return gradients(ours, x, **arguments)

    first = run()
    assert all(map(torch.equal, first, run()))
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)), 1e-2
    losses = []
    for sign in (1, -1):
        torch.manual_seed(4)
        with torch.no_grad():
            output, _ = ours(*(x + sign * step * direction,) * 3, **arguments)
        losses.append(output.square().sum().item())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx((first[1] * direction).sum().item(), rel=2e-2)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("sharing", ["self", "unbatched"])
def test_results_may_be_changed_in_place(sharing, grad_mode, served):
    ours, _ = modules(batch_first=True)
    given = inputs(sharing, True)
    with torch.set_grad_enabled(grad_mode):
        results = [y for _ in range(2) for y in ours(*given)]
    for y in results:
        y.mul_(2).add_(1)
    if grad_mode:
        sum(y.sum() for y in results).backward()
        assert ours.in_proj_weight.grad.isfinite().all()


def test_the_first_call_of_a_kind_saves_what_a_later_one_does(served):
    ours, _ = modules(batch_first=True)
    x = inputs("self", True)[0].requires_grad_()
    for _ in range(2):
        output = torch.utils.checkpoint.checkpoint(lambda y: ours(y, y, y)[0], x, use_reentrant=False)
        output.sum().backward()


@pytest.mark.parametrize("sharing", ["self", "keys and values"])
def test_a_second_derivative_reads_no_hidden_row_either(sharing, served):
    ours, _ = modules(batch_first=True)
    query, key, _ = inputs(sharing, True)
    arguments = masks("padding", S, sharing)
    key = key.masked_fill(arguments["key_padding_mask"].unsqueeze(-1), float("nan"))
    leaf = (key if sharing == "self" else query).detach().requires_grad_()
    output, _ = ours(leaf, *((leaf,) * 2 if sharing == "self" else (key,) * 2), **arguments)
    first = torch.autograd.grad(output.square().sum(), [leaf, *ours.parameters()], create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), [leaf, ours.in_proj_weight])
    assert all(y.isfinite().all() for y in (*first, *second))


@pytest.mark.parametrize("name", ["bias_k", "seed"])
def test_other_strides_that_a_hook_gives_back_are_noticed(name, served):
    ours, _ = modules(batch_first=True, add_bias_kv=True, dropout=0.5 if name == "seed" else 0.0)
    x, _, _ = inputs("self", True)
    shape = ours.bias_k.shape if name == "bias_k" else (2,)

    def run(unpack):
        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(lambda y: y, unpack):
            return gradients(ours, x)

    def sliced(y):
        return torch.stack((y, y + 1), -1)[..., 0] if y.shape == shape else y

    expected = run(lambda y: y)
    if name == "seed":  # which no back end reads
        with pytest.raises(RuntimeError, match="seed must be contiguous"):
            run(sliced)
        return
    found = run(sliced)
    for y, right in zip(found, expected, strict=True):
        torch.testing.assert_close(y, right)


@pytest.mark.parametrize("mask", [[[True]], "mask", 1, (True,)], ids=repr)
def test_masks_that_are_no_tensors_are_refused_as_on_the_cpu(mask, served):
    ours, _ = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    for _ in range(2):
        with pytest.raises(TypeError, match="must be a Tensor"):
            ours(x, x, x, attn_mask=mask)
        ours(x, x, x)


@pytest.mark.parametrize("change", ["double", "sliced"])
def test_saved_tensors_that_a_hook_changes_take_the_general_way(change, served):
    ours, _ = modules(batch_first=True)
    (x, _, _), arguments = inputs("self", True), masks("padding", S, "self")
    expected = gradients(ours, x, **arguments)
    served.clear()
    unpack = {
        "double": lambda y: y.double() if y.is_floating_point() else y,
        "sliced": lambda y: torch.stack((y, y), -1)[..., 0],
    }[change]
    with torch.autograd.graph.saved_tensors_hooks(lambda y: y, unpack):
        if change == "sliced":
            for found, right in zip(gradients(ours, x, **arguments), expected, strict=True):
                torch.testing.assert_close(found, right)
        else:
            with pytest.raises(RuntimeError):
                gradients(ours, x, **arguments)


CHANGES = {
    "a hook on out_proj": lambda module: module.out_proj.register_forward_hook(lambda *_: None),
    "another out_proj": lambda module: setattr(module, "out_proj", torch.nn.Sequential(module.out_proj)),
    "a parametrization": lambda module: torch.nn.utils.parametrizations.weight_norm(module.out_proj),
    "float16": lambda module: module.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_module_is_noticed(change, served):
    ours, _ = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    expected = [y.detach() for y in ours(x, x, x)]
    assert served
    served.clear()
    CHANGES[change](ours)
    x = x.half() if change == "float16" else x
    for found, right in zip(ours(x, x, x), expected, strict=True):
        torch.testing.assert_close(found.float(), right, atol=2e-3, rtol=2e-3)
    assert not served or change == "float16"


def test_another_number_of_heads_and_bad_input_are_noticed(served):
    ours, theirs = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    ours(x, x, x)
    for module in (ours, theirs):
        module.num_heads, module.head_dim = 8, E // 8
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0])
    with pytest.raises(AssertionError, match="embed_dim"):
        ours(*(x[..., :16],) * 3)
    with pytest.raises(AssertionError, match="key_padding_mask"):
        ours(x, x, x, key_padding_mask=torch.zeros(N, S + 1, dtype=torch.bool))


def test_explain_says_that_such_a_call_is_one_step(served):
    ours, _ = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    assert fused_mha.explain(ours, x).projections == "in one step with the attention, by torch's products"
    ours.out_proj.register_forward_hook(lambda *_: None)
    assert "apart from the attention" in fused_mha.explain(ours, x).projections
    assert not served


def test_the_out_projection_alone_learns_without_the_attention(served):
    ours, _ = modules(batch_first=True, add_bias_kv=True, dropout=0.5)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(name.startswith("out_proj"))
    x, _, _ = inputs("self", True)
    ours(x, x, x, need_weights=False)[0].sum().backward()
    assert served == ["forward", "backward"]
    assert ours.out_proj.weight.grad.any()


def test_weights_are_read_as_they_are_at_the_call(served):
    ours, theirs = modules(batch_first=True)
    x, _, _ = inputs("self", True)
    ours(x, x, x)
    for module in (ours, theirs):
        with torch.no_grad():
            module.in_proj_weight.mul_(2)
        module.out_proj.weight = torch.nn.Parameter(module.out_proj.weight.detach() * 3)
        module.in_proj_bias.data = module.in_proj_bias.data + 1
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0])


def test_head_sizes_of_no_16_bytes_take_the_steps(served):
    module = fused_mha.MultiHeadAttention(12, 2, batch_first=True)
    x = torch.randn(2, 5, 12)
    expected = torch.nn.MultiheadAttention(12, 2, batch_first=True)
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x, x, x)[0], expected(x, x, x)[0])
    assert not served


@pytest.mark.parametrize("learns", [False, True])
def test_what_takes_the_steps_is_projected_once_in_each_later_call(learns, served, monkeypatch):
    module, x = fused_mha.MultiHeadAttention(12, 2, batch_first=True), torch.randn(2, 5, 12, requires_grad=learns)
    products = []
    project = projections.packed_in_projection
    monkeypatch.setattr(projections, "packed_in_projection", lambda *of: (products.append(of), project(*of))[1])
    for _ in range(4):
        module(x, x, x, need_weights=False)
    assert len(products) == 5  # of the first call two, one of them to find out
    assert not served


def test_no_module_and_no_tensor_is_kept(served):
    module = fused_mha.MultiHeadAttention(E, 4, batch_first=True)
    x = torch.randn(N, S, E)
    module(x, x, x)
    assert len(plans._kept) == 1
    references = [weakref.ref(y) for y in (module, module.in_proj_weight, x)]
    del module, x
    gc.collect()
    assert [reference() for reference in references] == [None] * 3

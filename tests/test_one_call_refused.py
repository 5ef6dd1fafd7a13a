"""What one call of the C++ library does not serve: such calls go through the operators one by one, and are right."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrizations, parametrize, prune

import fused_mha
from calls import INF, NAN, Doubled, composed, random_module
from fused_mha import MultiHeadAttention
from fused_mha.testing import assert_parity


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


X = draw(2, 5, 8)
PADDING = torch.tensor([[False] * 5, [False, False, True, False, True]])


def assert_refused(one_calls, module, *inputs, **arguments):
    """Composed, and with the composition's results."""
    one_calls.clear()
    output, weights = module(*inputs, **arguments)
    assert not any(one_calls)
    with composed():
        expected = module(*inputs, **arguments)
    assert torch.equal(output, expected[0])
    assert (weights is expected[1] is None) or torch.equal(weights, expected[1])
    return output


def assert_changes(one_calls, change, **constructor):
    """A change of two equal modules takes effect, in both as torch's own module has it."""
    module = random_module(**constructor)
    stock = nn.MultiheadAttention(8, 2, batch_first=True, **constructor)
    stock.load_state_dict(module.state_dict())
    before = module(X, X, X)[0]
    assert one_calls == [True]
    for one in (module, stock):
        torch.manual_seed(5)
        change(one)
    for training in (True, False):
        output = assert_refused(one_calls, module.train(training), X, X, X)
        torch.testing.assert_close(output, stock(X, X, X)[0])
        assert not torch.equal(output, before)


def plain(holder, name):
    """Puts a plain tensor where a parameter was, as adapters do."""
    value = getattr(holder, name).detach() * 2
    delattr(holder, name)
    setattr(holder, name, value)


def buffer(holder, name):
    value = getattr(holder, name).detach() * 2
    delattr(holder, name)
    holder.register_buffer(name, value)


CHANGES = {
    "in_proj_weight parametrized": lambda m: parametrize.register_parametrization(m, "in_proj_weight", Doubled()),
    "in_proj_bias parametrized": lambda m: parametrize.register_parametrization(m, "in_proj_bias", Doubled()),
    "bias_k parametrized": lambda m: parametrize.register_parametrization(m, "bias_k", Doubled()),
    "out_proj.weight parametrized": lambda m: parametrize.register_parametrization(m.out_proj, "weight", Doubled()),
    "out_proj.bias parametrized": lambda m: parametrize.register_parametrization(m.out_proj, "bias", Doubled()),
    "orthogonal": lambda m: parametrizations.orthogonal(m.out_proj, "weight"),
    "weight_norm of in_proj": lambda m: (
        parametrizations.weight_norm(m, "in_proj_weight"),
        m.parametrizations.in_proj_weight.original0.data.mul_(2.0),
    ),
    "in_proj_weight pruned": lambda m: prune.l1_unstructured(m, "in_proj_weight", 0.5),
    "in_proj_bias pruned": lambda m: prune.l1_unstructured(m, "in_proj_bias", 0.5),
    "out_proj.weight pruned": lambda m: prune.l1_unstructured(m.out_proj, "weight", 0.5),
    "out_proj.bias pruned": lambda m: prune.l1_unstructured(m.out_proj, "bias", 0.5),
    "plain in_proj_weight": lambda m: plain(m, "in_proj_weight"),
    "plain in_proj_bias": lambda m: plain(m, "in_proj_bias"),
    "plain bias_k": lambda m: plain(m, "bias_k"),
    "plain out_proj.weight": lambda m: plain(m.out_proj, "weight"),
    "plain out_proj.bias": lambda m: plain(m.out_proj, "bias"),
    "buffer in_proj_weight": lambda m: buffer(m, "in_proj_weight"),
    "buffer in_proj_bias": lambda m: buffer(m, "in_proj_bias"),
    "buffer out_proj.weight": lambda m: buffer(m.out_proj, "weight"),
    "buffer out_proj.bias": lambda m: buffer(m.out_proj, "bias"),
    "shadowed out_proj.weight": lambda m: m.out_proj.__dict__.update(weight=torch.eye(8)),
    "shadowed out_proj.bias": lambda m: m.out_proj.__dict__.update(bias=torch.ones(8)),
    "shadowed in_proj_bias": lambda m: m.__dict__.update(in_proj_bias=torch.ones(24)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_replaced_parts_take_effect(change, one_calls):
    assert_changes(one_calls, change, add_bias_kv=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "out_proj", nn.Linear(8, 3)),
        lambda m: setattr(m, "out_proj", nn.Sequential(m.out_proj, nn.Tanh())),
        lambda m: setattr(m.out_proj, "forward", torch.tanh),
        lambda m: setattr(m, "out_proj", nn.LazyLinear(8)),
        lambda m: setattr(m, "out_proj", type("Own", (nn.Linear,), {"forward": lambda self, x: 2 * x})(8, 8)),
    ],
    ids=["size", "sequential", "forward", "lazy", "subclass"],
)
def test_another_out_proj_is_called(change, one_calls):
    module = random_module()
    module.out_proj, stock = nn.Identity(), module.out_proj
    heads = module(X, X, X)[0]
    module.out_proj = stock
    change(module)
    torch.testing.assert_close(module(X, X, X)[0], module.out_proj(heads))
    assert not any(one_calls)


@pytest.mark.parametrize("name", ["q_proj_weight", "k_proj_weight", "v_proj_weight"])
@pytest.mark.parametrize("replace", [plain, buffer])
def test_replaced_weights_of_their_own_take_effect(name, replace, one_calls):
    module = random_module(kdim=6, vdim=7)
    inputs = X, draw(2, 4, 6), draw(2, 4, 7)
    before = module(*inputs)[0]
    replace(module, name)
    assert not torch.equal(assert_refused(one_calls, module, *inputs), before)


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
HOOKS += ["register_full_backward_pre_hook"]
GLOBAL_HOOKS = ["register_module_forward_hook", "register_module_forward_pre_hook"]
GLOBAL_HOOKS += ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_out_proj_run(hook, one_calls):
    module, called = random_module(), []
    getattr(module.out_proj, hook)(lambda *_: called.append(hook))
    module(X, X, X)[0].sum().backward()
    assert called == [hook]
    assert one_calls == [False]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_with_keywords_on_out_proj_run(hook, one_calls):
    module, called = random_module(), []
    getattr(module.out_proj, hook)(lambda *_: called.append(hook), with_kwargs=True)
    module(X, X, X)
    assert called == [hook]
    assert one_calls == [False]


@pytest.mark.parametrize("hook", GLOBAL_HOOKS)
def test_hooks_on_every_module_run_for_out_proj(hook, one_calls):
    module, called = random_module(), []
    handle = getattr(hooks_of_all, hook)(lambda module, *_: called.append(module))
    try:
        x = X.clone().requires_grad_()
        module(x, x, x)[0].sum().backward()
    finally:
        handle.remove()
    assert module.out_proj in called
    assert one_calls == [False]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_module_itself_leave_it_one_call(hook, one_calls):
    module, called = random_module(), []
    getattr(module, hook)(lambda *_: called.append(hook))
    module(X, X.clone().requires_grad_(), X)[0].sum().backward()
    assert called == [hook]
    assert one_calls == [True]


def test_a_removed_hook_leaves_no_trace(one_calls):
    module = random_module()
    expected = module(X, X, X)[0]
    module.out_proj.register_forward_hook(lambda *_: None).remove()
    assert torch.equal(module(X, X, X)[0], expected)
    assert one_calls == [True, True]


def strided(x):
    """The same numbers, not contiguous in any dimension."""
    spread = torch.full((*(2 * size for size in x.shape),), NAN, dtype=x.dtype)
    view = spread[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize(
    "name", ["in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias"]
)
@pytest.mark.parametrize("lay_out", [strided, lambda x: x.t().contiguous().t() if x.dim() == 2 else strided(x)])
def test_parameters_that_are_not_contiguous_are_read_right(name, lay_out, one_calls):
    module = random_module(add_bias_kv=True)
    stock = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    stock.load_state_dict(module.state_dict())
    holder, _, last = name.rpartition(".")
    for one in (module, stock):
        owner = one.get_submodule(holder)
        setattr(owner, last, nn.Parameter(lay_out(getattr(owner, last).detach())))
    assert not getattr(module.get_submodule(holder), last).is_contiguous()
    assert_parity(module, stock, X, X, X)


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize("role", range(3))
def test_subclasses_of_tensor_are_kept(role, one_calls):
    inputs = [X.clone(), X.clone(), X.clone()]
    inputs[role] = inputs[role].as_subclass(Wrapped)
    output = random_module()(*inputs)[0]
    assert type(output) is Wrapped
    assert one_calls == [False]


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_of_a_subclass_are_kept(name, one_calls):
    mask = (torch.zeros(5, 5) if name == "attn_mask" else torch.zeros(2, 5)).as_subclass(Wrapped)
    random_module()(X, X, X, **{name: mask})
    assert one_calls == [False]


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_another_back_end_is_never_replaced(name, one_calls):
    module = random_module()
    expected = module(X, X, X, need_weights=False)[0]
    with fused_mha.backend(name):
        torch.testing.assert_close(module(X, X, X, need_weights=False)[0], expected)
    with fused_mha.backend("cpu"):
        assert torch.equal(module(X, X, X, need_weights=False)[0], expected)
    assert one_calls == [True, False, True]


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_gradients_of_masks_are_given(name, one_calls):
    module = random_module()
    mask = draw(5, 5) if name == "attn_mask" else draw(2, 5)
    mask.requires_grad_()
    module(X, X, X, **{name: mask})[0].square().sum().backward()
    assert bool((mask.grad != 0).all())
    assert one_calls == [False]


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("sharing", ["self", "cross", "key", "value"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_hidden_keys_are_never_read(sharing, kind, poison, batch_first, one_calls):
    module = random_module(batch_first=batch_first)
    padding = PADDING if kind == "bool" else torch.zeros(2, 5).masked_fill(PADDING, -INF)

    def run(poison):
        x = X.clone()
        x[PADDING] = poison
        dirty = x if batch_first else x.transpose(0, 1)
        clean = X if batch_first else X.transpose(0, 1)
        key, value = dirty if sharing != "value" else clean, dirty if sharing != "key" else clean
        output, weights = module(dirty if sharing == "self" else clean, key, value, key_padding_mask=padding)
        output = output if batch_first else output.transpose(0, 1)
        counts = output[~PADDING]  # in self-attention a hidden row is a query too
        gradients = torch.autograd.grad((counts.sum(), weights[~PADDING].square().sum()), [*module.parameters()])
        return counts, weights[~PADDING], *gradients

    expected = run(0.0)
    assert one_calls == [True]
    for ours, clean in zip(run(poison), expected, strict=True):
        assert bool(ours.isfinite().all())
        torch.testing.assert_close(ours, clean)


@pytest.mark.parametrize("which", ["key", "value"])
def test_hidden_numbers_that_overflow_in_the_half_type_of_autocast_reach_no_gradient(which, one_calls):
    module = random_module()
    key, value = X.clone(), X.clone()
    (key if which == "key" else value)[PADDING] = 1e6
    with torch.autocast("cpu", dtype=torch.float16):
        output, weights = module(X, key, value, key_padding_mask=PADDING)
    (output.float().sum() + weights.float().square().sum()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())


def test_nan_in_the_query_alone_is_no_reason(one_calls):
    module = random_module()
    query = X.clone()
    query[0, 2] = NAN
    output = module(query, X, X, key_padding_mask=PADDING)[0]
    assert bool(output[0, 2].isnan().all())
    assert int(output.isnan().sum()) == 8
    assert one_calls == [True]


def test_a_float8_mask_is_taken(one_calls):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -448.0).to(torch.float8_e4m3fn)
    module = random_module()
    assert_refused(one_calls, module, X, X, X, attn_mask=mask)


def test_one_of_bias_k_and_bias_v_is_refused_by_name(one_calls):
    for name in ("bias_k", "bias_v"):
        module = random_module(add_bias_kv=True)
        setattr(module, name, None)
        with pytest.raises(AssertionError, match="bias_k and bias_v"):
            module(X, X, X)


@pytest.mark.parametrize("shape", [((0, 5, 8), (0, 5, 8)), ((2, 0, 8), (2, 5, 8)), ((2, 5, 8), (2, 0, 8))], ids=str)
def test_empty_inputs_are_composed(shape, one_calls):
    query, key = (torch.randn(size) for size in shape)
    module = random_module()
    output, weights = module(query, key, key)
    assert output.shape == query.shape
    assert weights.shape == (query.shape[0], query.shape[1], key.shape[1])
    assert one_calls == [False]


def test_the_meta_device_gives_shapes(one_calls):
    module = random_module().to("meta")
    x = X.to("meta")
    assert module(x, x, x)[0].shape == X.shape
    assert one_calls == [False]


def test_another_dtype_than_the_parameters_is_refused_as_by_torch(one_calls):
    with pytest.raises(RuntimeError, match="dtype"):
        random_module()(X.double(), X.double(), X.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torch_func_and_forward_mode_are_right(one_calls):
    module, x = random_module(dtype=torch.float64), X.double()
    expected = module(x, x, x)[0]
    one_calls.clear()
    mapped = torch.func.vmap(lambda y: module(y, y, y)[0])(x)
    torch.testing.assert_close(mapped, expected)
    gradient = torch.func.grad(lambda y: module(y, y, y)[0].sum())(x)
    _, tangent = torch.func.jvp(lambda y: module(y, y, y)[0].sum(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(gradient.sum(), tangent)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        other = forward_ad.unpack_dual(module(dual, dual, dual)[0].sum()).tangent
    torch.testing.assert_close(other, tangent)
    assert not any(one_calls)


def test_functional_call_takes_the_given_parameters(one_calls):
    module = random_module()
    values = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    assert not torch.func.functional_call(module, values, (X, X, X))[0].any()
    assert module(X, X, X)[0].any()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compilers_and_tracers_see_operators(one_calls):
    module = random_module().eval()
    expected = module(X, X, X)[0]
    one_calls.clear()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, X, X)[0], expected)
    assert one_calls == [True]
    y = draw(2, 5, 8) * 2
    expected = compiled(y, y, y)[0]
    one_calls.clear()
    with torch.no_grad():
        graph = make_fx(lambda x: module(x, x, x)[0])(X)
        exported = torch.export.export(module, (X, X, X)).module()
        traced = torch.jit.trace(module, (X, X, X), check_trace=False)
    for other in (lambda x: exported(x, x, x)[0], graph, lambda x: traced(x, x, x)[0]):
        torch.testing.assert_close(other(y), expected, rtol=1e-4, atol=1e-3)
    assert not any(one_calls)


def test_a_subclass_of_the_module_is_served(one_calls):
    class Own(MultiHeadAttention):
        pass

    module = Own(8, 2, batch_first=True)
    module(X, X, X)
    assert one_calls == [True]

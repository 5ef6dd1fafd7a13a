"""`MultiHeadAttention.forward`'s ``weights_of_heads``, with every option, layout and cache, and inside torch."""

import pytest
import torch
from torch import fx, nn

import fused_mha
from fused_mha import KeyValueCache, MultiHeadAttention
from options_oracle import EVERYTHING, OPTIONS, E, H, module_with

N, L, S = 2, 5, 7
HEADS = (3, 0)
CONFIGS = (
    {"no option": {}}
    | OPTIONS
    | {"everything": EVERYTHING, "virtual keys": {"add_bias_kv": True, "add_zero_attn": True}}
    | {"dropout": {"dropout": 0.4}, "separate weights": {"kdim": 6, "vdim": 9}}
)
PER_HEAD = {"average_attn_weights": False}
NAMED = PER_HEAD | {"weights_of_heads": HEADS}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def inputs_for(module):
    query = draw(N, L, E)
    if module.options is not None and module.options.rope is not None:
        return query, query, query
    return query, draw(N, S, module.kdim), draw(N, S, module.vdim)


def results_and_gradients(module, inputs, heads=None, **call):
    """Output, weights of the heads, and the gradients of inputs and parameters through both."""
    torch.manual_seed(2)
    leaves = [x.clone().requires_grad_() for x in dict.fromkeys(inputs)]
    given = dict(zip(dict.fromkeys(inputs), leaves, strict=True))
    output, weights = module(*(given[x] for x in inputs), **call)
    weights = weights if heads is None else weights[:, list(heads)]
    loss = (output * draw(*output.shape)).sum() + (weights * draw(*weights.shape)).sum()
    gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
    return output.detach(), weights.detach(), *gradients


@every_config
def test_they_are_those_of_all_heads_with_the_same_gradients(config):
    module = module_with(**config)
    inputs = inputs_for(module)
    some = results_and_gradients(module, inputs, **NAMED)
    expected = results_and_gradients(module, inputs, HEADS, **PER_HEAD)
    assert some[1].shape == (N, 2, L, inputs[1].shape[1] + 2 * config.get("add_zero_attn", False))
    for ours, every in zip(some, expected, strict=True):
        torch.testing.assert_close(ours, every, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_need_weights_is_for_those_of_all_heads(need_weights):
    module, x = module_with(), draw(N, L, E)
    _, weights = module(x, x, x, need_weights=need_weights, **NAMED)
    assert weights.shape == (N, 2, L, L)


@pytest.mark.parametrize("batch_first", [False, True])
def test_every_layout(batch_first):
    module = MultiHeadAttention(E, H, batch_first=batch_first)
    batched, unbatched = draw(L, N, E), draw(L, E)
    _, weights = module(batched, batched, batched, **NAMED)
    _, every = module(batched, batched, batched, **PER_HEAD)
    torch.testing.assert_close(weights, every[:, list(HEADS)])
    output, weights = module(unbatched, unbatched, unbatched, **NAMED)
    expected = module(unbatched, unbatched, unbatched, **PER_HEAD)
    torch.testing.assert_close((output, weights), (expected[0], expected[1][list(HEADS)]))
    assert weights.shape == (2, L, L)


@every_config
def test_a_cache_gives_them_for_all_tokens_so_far(config):
    if "kdim" in config:
        pytest.skip("a cache is for self-attention")
    module, x = module_with(**config).eval(), draw(N, L, E)
    _, expected = module(x, x, x, is_causal=True, **PER_HEAD)
    cache = KeyValueCache(module, N)
    for i in range(L):
        token = x[:, i : i + 1]
        with torch.no_grad():
            _, weights = module(token, token, token, is_causal=True, cache=cache, **NAMED)
        columns = [*range(i + 1), *range(L, expected.shape[3])]  # the virtual keys come last
        torch.testing.assert_close(weights[:, :, 0], expected[:, list(HEADS), i][..., columns], rtol=1e-4, atol=1e-5)


def test_a_ring_cache_has_dropped_the_keys_that_they_would_be_of():
    module, x = module_with(window=(2, 0)).eval(), draw(N, L, E)
    cache, token = KeyValueCache(module, N, ring=True), x[:, :1]
    with torch.no_grad():
        module(x, x, x, need_weights=False, is_causal=True, cache=cache)
        with pytest.raises(ValueError, match="weights"):
            module(token, token, token, need_weights=False, is_causal=True, cache=cache, weights_of_heads=(0,))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_have_zeros_for_padded_queries():
    module = module_with().eval()
    sequences = [draw(3, E), draw(5, E)]
    nested = torch.nested.nested_tensor(sequences)
    with torch.no_grad():
        _, weights = module(nested, nested, nested, **NAMED)
        for n, x in enumerate(sequences):
            _, expected = module(x, x, x, **NAMED)
            torch.testing.assert_close(weights[n, :, : len(x), : len(x)], expected)
    assert weights.shape == (2, 2, 5, 5)
    assert not weights[0, :, 3:].any()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("config", [{}, EVERYTHING], ids=["no option", "everything"])
def test_a_compiled_module_gives_them_at_any_length(config):
    module = module_with(**config)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for length in (5, 7):
        x = draw(N, length, E)
        ours, expected = (results_and_gradients(function, (x, x, x), **NAMED) for function in (compiled, module))
        for found, eager in zip(ours, expected, strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{}, EVERYTHING], ids=["no option", "everything"])
def test_an_exported_module_gives_them(config):
    module, x = module_with(**config).eval(), draw(N, L, E)
    program = torch.export.export(module, (x, x, x), NAMED).module()
    torch.testing.assert_close(program(x, x, x, **NAMED), module(x, x, x, **NAMED))


def test_a_traced_graph_gives_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module_with()

        def forward(self, x):
            return self.attention(x, x, x, average_attn_weights=False, weights_of_heads=HEADS)

    model, x = Model(), draw(N, L, E)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


def test_second_derivatives():
    module = module_with(torch.float64)
    x = draw(1, 3, E).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x, x, x, **NAMED)[1], (x,))


def test_vmap_and_grad_take_them():
    module, x = module_with(), draw(3, N, L, E)

    def weights(x):
        return module(x, x, x, **NAMED)[1]

    torch.testing.assert_close(torch.func.vmap(weights)(x), torch.stack([weights(row) for row in x]))
    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(weights(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: weights(x).square().sum())(x[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_them_in_the_lower_precision(dtype):
    module, x = module_with(), draw(N, L, E)
    expected = module(x, x, x, **NAMED)[1]
    with torch.autocast("cpu", dtype=dtype):
        weights = module(x, x, x, **NAMED)[1]
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.float(), expected, rtol=0.05, atol=0.05)


def test_explain_says_that_one_call_does_not_serve_them():
    module, x = MultiHeadAttention(256, 4, batch_first=True), torch.randn(2, 5, 256)
    explanation = fused_mha.explain(module, x, **NAMED)
    assert explanation.chosen == "cpu"
    assert explanation.projections.endswith("one call gives the weights of no head by name")
    with pytest.raises(IndexError, match="weights_of_heads must name heads from 0 to H - 1 = 3"):
        fused_mha.explain(module, x, weights_of_heads=(4,))


MISTAKES = [
    ({"weights_of_heads": HEADS}, ValueError, "give average_attn_weights=False beside it; got average_attn_weights=T"),
    (PER_HEAD | {"weights_of_heads": (4,)}, IndexError, r"heads from 0 to H - 1 = 3; got \(4,\)"),
    (PER_HEAD | {"weights_of_heads": [0, 0]}, ValueError, r"must name a head once; got \(0, 0\)"),
    (PER_HEAD | {"weights_of_heads": ()}, ValueError, "must name a head at least"),
    (PER_HEAD | {"weights_of_heads": 1}, TypeError, "must be a tuple of ints, .*; got 1"),
]


@pytest.mark.parametrize(("call", "error", "text"), MISTAKES, ids=[text for _, _, text in MISTAKES])
def test_a_mistake_is_named_and_leaves_a_cache_as_it_was(call, error, text):
    module, x = module_with(), draw(N, L, E)
    cache = KeyValueCache(module, N)
    for others in ({}, {"cache": cache}):
        with pytest.raises(error, match=text):
            module(x, x, x, **call, **others)
    assert cache.length == 0

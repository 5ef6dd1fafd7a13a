"""One token behind a cache: by the library's kernels what the steps give, and which calls take the steps."""

import contextlib

import pytest
import torch
from torch.nn.utils import parametrize

import fused_mha
from decoding import CONFIGS, L, N, assert_same, draw, every_config
from fused_mha import KeyValueCache
from fused_mha.backends import cpu
from fused_mha.module import decoding
from options_oracle import EVERYTHING, E, module_with

pytestmark = pytest.mark.skipif(cpu.LIBRARY is None, reason="there is no C++ library")


@pytest.fixture
def by_steps(monkeypatch):
    """The calls that the steps have served, where our product is the faster one, as on processors with vectors."""
    monkeypatch.setattr(decoding.linear, "serves", lambda *_: True)
    calls, with_options = [], decoding.steps.with_options

    def spy(*arguments):
        calls.append(arguments)
        return with_options(*arguments)

    monkeypatch.setattr(decoding.steps, "with_options", spy)
    return calls


def token_of(module, x, cache, **call):
    with torch.no_grad():
        return module(x, x, x, **{"need_weights": False, "is_causal": True, "cache": cache} | call)[0]


@pytest.mark.parametrize("pads", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("batch_first", [True, False])
@every_config
def test_a_token_by_kernels_is_that_by_steps(config, batch_first, pads, by_steps, monkeypatch):
    module, x = module_with(torch.float64, **config), draw(N, L, E)
    module.batch_first = batch_first
    cache, twin = KeyValueCache(module, N), KeyValueCache(module, N)
    layout = x if batch_first else x.transpose(0, 1)
    prompt = layout.narrow(1 if batch_first else 0, 0, 6)
    padding = {"key_padding_mask": torch.tensor([[False] * 6, [True] * 2 + [False] * 4])} if pads else {}
    for each in (cache, twin):
        token_of(module, prompt, each, **padding)
    by_steps.clear()
    for i in range(6, L):
        token = layout.narrow(1 if batch_first else 0, i, 1)
        ours = token_of(module, token, cache)
        assert not by_steps
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_projections", lambda *_: None)
            assert_same(ours, token_of(module, token, twin))
        assert by_steps
        by_steps.clear()
        assert ours.shape == token.shape
        assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_token_in_other_dtypes(dtype, by_steps):
    module, x = module_with(dtype, **EVERYTHING), draw(N, L, E, dtype=dtype)
    cache = KeyValueCache(module, N)
    output = torch.cat([token_of(module, x[:, i : i + 1], cache) for i in range(L)], 1)
    assert not by_steps
    expected, _ = module(x, x, x, is_causal=True)
    bound = {torch.float32: torch.float32}.get(dtype, torch.bfloat16)
    assert_same(output, expected, bound)


@pytest.mark.parametrize("config", [{}, EVERYTHING], ids=["no option", "everything"])
def test_an_unbatched_token(config, by_steps):
    module, x = module_with(torch.float64, **config), draw(1, L, E)
    cache = KeyValueCache(module, 1)
    output = torch.cat([token_of(module, x[0, i : i + 1], cache) for i in range(L)])
    assert not by_steps
    assert_same(output, module(x, x, x, is_causal=True)[0][0])


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def _hooked(module):
    module.out_proj.register_forward_hook(lambda module, args, result: 2 * result)


def _parametrized(module):
    parametrize.register_parametrization(module, "in_proj_weight", Doubled())


def _replaced(module):
    module.out_proj = torch.nn.Sequential(module.out_proj, Doubled())


def _plain(module):
    weight = module.in_proj_weight.detach() * 2
    del module.in_proj_weight
    module.in_proj_weight = weight


def _drops(module):
    module.train().dropout = 0.5


OTHERS = {
    "a hook": (_hooked, {}, contextlib.nullcontext),
    "a parametrization": (_parametrized, {}, contextlib.nullcontext),
    "a replaced out_proj": (_replaced, {}, contextlib.nullcontext),
    "a plain tensor": (_plain, {}, contextlib.nullcontext),
    "dropout": (_drops, {}, contextlib.nullcontext),
    "weights": (None, {"need_weights": True}, contextlib.nullcontext),
    "a mask": (None, {"attn_mask": torch.zeros(1, 4)}, contextlib.nullcontext),
    "padding": (None, {"key_padding_mask": torch.zeros(N, 1, dtype=torch.bool)}, contextlib.nullcontext),
    "positions": (None, {"positions": torch.tensor([3])}, contextlib.nullcontext),
    "another back end": (None, {}, lambda: fused_mha.backend("reference")),
    "a transform": (None, {}, torch.autograd.forward_ad.dual_level),
}


@pytest.mark.parametrize(("change", "call", "context"), OTHERS.values(), ids=OTHERS)
def test_what_the_kernels_do_not_serve_takes_the_steps(change, call, context, by_steps):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 4, E)
    cache = KeyValueCache(module, N)
    for i in range(3):
        token_of(module, x[:, i : i + 1], cache)
    assert not by_steps
    if change is not None:
        change(module)
    with context():
        token_of(module, x[:, 3:], cache, **call)
    assert len(by_steps) == 1
    assert cache.length == 4


def test_tokens_of_which_one_is_no_key_take_the_steps(by_steps):
    module, x = module_with(torch.float64), draw(N, 1, E)
    with torch.no_grad():
        for key, value in ((x.clone(), x), (x, x.clone())):
            module(x, key, value, need_weights=False, cache=KeyValueCache(module, N))
    assert len(by_steps) == 2
    y = x.clone().requires_grad_()
    output, _ = module(y, y, y, need_weights=False, cache=KeyValueCache(module, N))
    assert torch.autograd.grad(output.sum(), y)[0].shape == y.shape
    with torch.autocast("cpu", torch.bfloat16):
        module = module.float()
        token_of(module, x.float(), KeyValueCache(module, N, dtype=torch.bfloat16))
    assert len(by_steps) == 4


def test_a_token_whose_product_torch_makes_faster_takes_the_steps(by_steps, monkeypatch):
    monkeypatch.setattr(decoding.linear, "serves", lambda *_: False)
    module, x = module_with(torch.float64), draw(N, 1, E)
    token_of(module, x, KeyValueCache(module, N))
    assert len(by_steps) == 1


def test_an_error_is_that_of_the_steps():
    module, x = module_with(torch.float64), draw(N, 1, E)
    cache = KeyValueCache(module, N)
    with pytest.raises(RuntimeError, match=r"must have one dtype .* got torch.float32"):
        token_of(module, x.float(), cache)
    with pytest.raises(AssertionError, match=f"query must have embedding size embed_dim = {E}"):
        token_of(module, x[..., 1:], cache)
    with pytest.raises(ValueError, match="cache must have the call's batch size, 1; got 2"):
        token_of(module, x[:1], cache)
    with pytest.raises(TypeError, match=r"cache must be a fused_mha\.KeyValueCache; got str"):
        token_of(module, x, "cache")
    module.num_heads = "4"
    with pytest.raises(TypeError, match="num_heads must be an int; got '4'"):
        token_of(module, x, cache)
    assert cache.length == 0


def test_a_changed_parameter_is_seen(by_steps):
    module, x = module_with(torch.float64, **CONFIGS["no option"]), draw(N, 3, E)
    cache, twin = KeyValueCache(module, N), KeyValueCache(module, N)
    for each in (cache, twin):
        token_of(module, x[:, :1], each)
    with torch.no_grad():
        module.in_proj_weight.mul_(2)
        module.out_proj.weight = torch.nn.Parameter(module.out_proj.weight * 3)
    output = token_of(module, x[:, 1:2], cache)
    assert not by_steps
    assert_same(output, token_of(module, x[:, 1:2], twin, need_weights=True))

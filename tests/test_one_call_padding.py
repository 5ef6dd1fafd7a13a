"""Keys that a right-hand padding hides are not projected, where that pays; nothing else changes."""

from unittest import mock

import pytest
import torch
from torch import nn

from fused_mha import MultiHeadAttention
from fused_mha.backends import cpu
from fused_mha.module import one_call
from fused_mha.module.arguments import ModuleArguments

pytestmark = pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no CPU library")

N, L, S, E, H = 4, 21, 40, 16, 2
RIGHT = torch.arange(S) >= torch.tensor([40, 9, 30, 17])[:, None]


@pytest.fixture
def packs(monkeypatch):
    """Which calls had packed keys; every size of call may."""
    monkeypatch.setattr(one_call, "_LEAST_WORK", 0)
    found = []
    original = one_call._without_padding

    def watched(*arguments):
        packed = original(*arguments)
        found.append(packed is not None)
        return packed

    monkeypatch.setattr(one_call, "_without_padding", watched)
    return found


def built(**options):
    module = MultiHeadAttention(E, H, batch_first=True, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def results(module, inputs, padding=RIGHT, **settings):
    """Output and gradients; the same dropout in every call."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    query, key, value = leaves[0], leaves[min(1, len(leaves) - 1)], leaves[-1]
    torch.manual_seed(5)
    output, _ = module(query, key, value, key_padding_mask=padding, need_weights=False, **settings)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return output.detach(), torch.autograd.grad(output, [*leaves, *module.parameters()], cotangent)


def unpacked(module, inputs, padding=RIGHT, **settings):
    with mock.patch.object(one_call, "_without_padding", return_value=None):
        return results(module, inputs, padding, **settings)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [(S, E)]),
        ({"bias": False}, [(L, E), (S, E)]),
        ({"kdim": 6, "vdim": 10}, [(L, E), (S, 6), (S, 10)]),
        ({"dropout": 0.4}, [(S, E)]),
    ],
    ids=["self", "cross", "other sizes", "dropout"],
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_has_the_same_bits_and_the_gradients_are_equal(packs, options, sizes, is_causal, dtype):
    module, inputs = built(dtype=dtype, **options), [torch.randn(N, *size, dtype=dtype) for size in sizes]
    output, grads = results(module, inputs, is_causal=is_causal)
    assert packs == [True]
    expected, expected_grads = unpacked(module, inputs, is_causal=is_causal)
    assert torch.equal(output, expected)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    torch.testing.assert_close(grads, expected_grads, **tolerance)


def test_inference_has_the_bits_of_training(packs):
    module, x = built(), torch.randn(N, S, E)
    trained, _ = results(module, [x])
    with torch.no_grad():
        inferred, _ = module.eval()(x, x, x, key_padding_mask=RIGHT, need_weights=False)
    assert packs == [True, True]
    assert torch.equal(inferred, trained)


def test_hidden_keys_that_are_nan_reach_nothing(packs):
    module, query, key = built(), torch.randn(N, L, E), torch.randn(N, S, E)
    key[RIGHT] = float("nan")
    output, grads = results(module, [query, key])
    assert all(bool(x.isfinite().all()) for x in (output, *grads[:1], *grads[2:]))


@pytest.mark.parametrize(
    ("padding", "options", "settings"),
    [
        (RIGHT.flip(1), {}, {}),
        (torch.arange(S) >= torch.tensor([40, 8, 30, 17])[:, None], {}, {}),
        (torch.arange(S) >= torch.tensor([40, 30, 30, 30])[:, None], {}, {}),
        (RIGHT.float(), {}, {}),
        (RIGHT, {}, {"attn_mask": torch.zeros(S, S)}),
        (RIGHT, {"add_zero_attn": True}, {}),
        (RIGHT, {"add_bias_kv": True}, {}),
        (torch.arange(S) >= torch.tensor([10, 9, 30, 10])[:, None], {}, {}),
    ],
    ids=["at the left", "few keys", "little of it", "float", "beside a mask", "a zero key", "a bias key", "few rows"],
)
def test_other_padding_is_left_to_the_core(packs, padding, options, settings):
    module, x = built(**options), torch.randn(N, S, E)
    results(module, [x], padding, **settings)
    assert packs == [False]


def test_small_calls_are_left_as_they_are():
    module, x = built(), torch.randn(N, S, E)
    tensors = one_call.tensors_of(module, _arguments(x))
    assert one_call._without_padding(module, _arguments(x), tensors) is None


def _arguments(x):
    return ModuleArguments(x, x, x, RIGHT, False, None, True, False)

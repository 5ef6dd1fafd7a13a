"""Options of `MultiHeadAttention` against an oracle in plain torch operators: alone, in pairs, in random combination."""

import itertools

import pytest
import torch

from options_oracle import OPTIONS, E, H, assert_matches, module_with

N, L = 2, 7


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def self_attention(dtype=torch.float32, length=L):
    return (draw(N, length, E, dtype=dtype),) * 3


PADDING = torch.arange(L) >= torch.tensor([[7], [4]])
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"key_padding_mask": PADDING},
    "float mask": {"attn_mask": draw(L, L, seed=4)},
    "causal, padding, mask": {
        "is_causal": True,
        "key_padding_mask": PADDING,
        "attn_mask": draw(N, H, L, L, seed=4) > 1.0,
    },
}
PAIRS = {
    f"{a}, {b}": OPTIONS[a] | OPTIONS[b]
    for a, b in itertools.combinations(OPTIONS, 2)
    if not OPTIONS[a].keys() & OPTIONS[b].keys() and not (OPTIONS[a].keys() | OPTIONS[b].keys()) >= {"rope", "head_dim"}
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_an_option_alone_is_that_of_the_oracle(config, call, dtype):
    assert_matches(module_with(dtype, **config), config, self_attention(dtype), **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_an_option_in_half_types_is_that_of_the_oracle(config, dtype):
    assert_matches(module_with(dtype, **config), config, self_attention(dtype), is_causal=True)


@pytest.mark.parametrize("config", PAIRS.values(), ids=PAIRS)
def test_two_options_together_are_those_of_the_oracle(config):
    module = module_with(add_bias_kv=True, add_zero_attn=True, **config)
    assert_matches(module, config | {"add_zero_attn": True}, self_attention(), is_causal=True, key_padding_mask=PADDING)

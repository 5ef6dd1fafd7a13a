"""Decoding by a module with a `KeyValueCache`, as the tests of caches do it, and the options that they go through."""

import pytest
import torch

from options_oracle import EVERYTHING, OPTIONS

N, L = 2, 11
CONFIGS = (
    {"no option": {}}
    | OPTIONS
    | {"everything": EVERYTHING, "virtual keys": {"add_bias_kv": True, "add_zero_attn": True}}
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def decode(module, cache, x, chunks, **call):
    """The outputs of the chunks of (N, L, E), side by side."""
    outputs = []
    with torch.no_grad():
        for chunk in x.split(chunks, 1):
            outputs.append(module(chunk, chunk, chunk, need_weights=False, is_causal=True, cache=cache, **call)[0])
    return torch.cat(outputs, 1)


def assert_same(ours, expected, dtype=torch.float64):
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)


def state(cache):
    """All that a later call can see."""
    kept = [x[:, : cache._stored].clone() for x in (cache._keys, cache._values)]
    return kept, cache.length, cache.lengths, cache._hidden, cache._stored


def assert_unchanged(cache, before):
    torch.testing.assert_close(state(cache), before, rtol=0, atol=0)


def interrupt(*_):
    raise KeyboardInterrupt

"""A `KeyValueCache` that does not fit, and calls that fail beside one: errors name it, and the cache is as it was."""

import copy
import pickle

import pytest
import torch

from decoding import L, N, assert_unchanged, decode, draw, interrupt, state
from fused_mha import KeyValueCache
from options_oracle import EVERYTHING, E, module_with


def _of_other_lengths(module, batch_size):
    cache, x = KeyValueCache(module, batch_size), draw(batch_size, 4, E)
    decode(module, cache, x, 4)
    cache.truncate([*range(batch_size)])
    return cache


MISTAKES = {
    "no cache": (lambda module: {"key": 0}, TypeError, "cache must be a fused_mha.KeyValueCache; got dict"),
    "another module": (
        lambda module: KeyValueCache(copy.deepcopy(module), N),
        ValueError,
        r"cache must be one of this module, KeyValueCache\(module, batch_size\); got that of another",
    ),
    "another batch": (
        lambda module: KeyValueCache(module, 3),
        ValueError,
        "cache must have the call's batch size, 2; got 3",
    ),
    "another batch, of other lengths": (
        lambda module: _of_other_lengths(module, 3),
        ValueError,
        "cache must have the call's batch size, 2; got 3",
    ),
    "another dtype": (
        lambda module: KeyValueCache(module, N, dtype=torch.float32),
        ValueError,
        "cache must have the dtype and device of this call's keys, torch.float64 on cpu; got torch.float32 on cpu",
    ),
    "another device": (
        lambda module: KeyValueCache(module, N).to("meta"),
        ValueError,
        "torch.float64 on cpu; got torch.float64 on meta",
    ),
    "other heads": (
        lambda module: pickle.loads(pickle.dumps(KeyValueCache(module_with(torch.float64), N))),
        ValueError,
        r"cache must have keys of this module's heads and sizes, \(2, 6\); got those of a module with \(4, 3\)",
    ),
}


@pytest.mark.parametrize(("cache", "error", "text"), MISTAKES.values(), ids=MISTAKES)
def test_a_cache_that_does_not_fit_is_named(cache, error, text):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 3, E)
    with pytest.raises(error, match=text):
        module(x, x, x, cache=cache(module))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"module": torch.nn.MultiheadAttention(8, 2)},
            TypeError,
            "must be a fused_mha.MultiHeadAttention; got M",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1; got 0"),
        ({"batch_size": None}, ValueError, "batch_size must be an int of at least 1; got None"),
        ({"max_length": 2.0}, ValueError, "max_length must be an int of at least 1; got 2.0"),
        ({"ring": True}, ValueError, r"ring=True needs a module with window=\(left, right\), left a number; got wind"),
        (
            {"ring": True, "max_length": 9, "module": module_with(window=(1, 0))},
            ValueError,
            "ring=True has no end: max_length must be None; got 9",
        ),
    ],
    ids=str,
)
def test_a_mistake_in_a_new_cache_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        KeyValueCache(**{"module": module_with(), "batch_size": N} | arguments)


TOKENS = draw(N, 4, E)
FAILING = {
    "too many tokens": ({}, ValueError, "cache has room for max_length = 8 tokens, and has 6; got 4 more"),
    "a mask of the new keys alone": (
        {"query": TOKENS[:, :2], "attn_mask": torch.zeros(2, 2)},
        RuntimeError,
        r"attn_mask must have shape \(L, S\) = \(2, 8\)",
    ),
    "float padding": (
        {"query": TOKENS[:, :2], "key_padding_mask": torch.zeros(N, 2)},
        TypeError,
        "key_padding_mask must be bool beside a cache, which keeps it; got torch.float32",
    ),
    "padding of all keys": (
        {"query": TOKENS[:, :2], "key_padding_mask": torch.zeros(N, 8).bool()},
        AssertionError,
        r"key_padding_mask must have shape \(N, S\) = \(2, 2\)",
    ),
    "a hook that raises": ({"query": TOKENS[:, :2]}, KeyboardInterrupt, None),
}


@pytest.mark.parametrize(("call", "error", "text"), FAILING.values(), ids=FAILING)
def test_a_call_that_fails_leaves_the_cache_as_it_was(call, error, text):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 8, E)
    cache = KeyValueCache(module, N, max_length=8)
    decode(module, cache, x[:, :6], [6])
    cache.truncate([6, 5])
    before = state(cache)
    query = call.get("query", TOKENS)
    handle = module.out_proj.register_forward_hook(interrupt) if error is KeyboardInterrupt else None
    with torch.no_grad(), pytest.raises(error, match=text):
        module(**{"query": query, "key": query, "value": query} | call, cache=cache)
    if handle is not None:
        handle.remove()
    assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (-1, r"length must be a count of tokens, or \(N\) = \(2,\) counts; got -1"),
        ([1, 2, 3], r"got \[1, 2, 3\]"),
        (1.0, "got 1.0"),
        ([True, False], r"counts; got \[True, False\]"),
        (12, r"reaches back to, 3 tokens, of which the ring has dropped the first \[14, 14\]; got 12"),
        ([19, 14], r"dropped the first \[14, 14\]; got \[19, 14\]"),
    ],
    ids=str,
)
def test_a_mistake_in_truncation_is_named_and_changes_nothing(length, text):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 20, E)
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x, [17, 1, 1, 1])
    assert cache._dropped == 14
    before = state(cache)
    with pytest.raises(ValueError, match=text):
        cache.truncate(length)
    assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        (torch.tensor([0, 2]), r"indices must be in \[0, batch_size = 2\); got \[0, 2\]"),
        (torch.tensor([[0]]), r"indices must be \(M\) of an integer dtype; got \(1, 1\), torch.int64"),
        (torch.tensor([], dtype=torch.int64), r"indices must be \(M\) of an integer dtype; got \(0,\), torch.int64"),
        (torch.tensor([0.0]), r"indices must be \(M\) of an integer dtype; got \(1,\), torch.float32"),
    ],
    ids=str,
)
def test_a_mistake_in_reordering_is_named(indices, text):
    with pytest.raises(ValueError, match=text):
        KeyValueCache(module_with(), N).reorder(indices)


def test_reordering_by_a_list_is_refused():
    with pytest.raises(TypeError, match=r"indices must be a Tensor, not list: torch\.tensor makes one"):
        KeyValueCache(module_with(), N).reorder([1, 0])


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        ([1], TypeError, "attn_mask must be a Tensor, not list"),
        (torch.zeros(L, L, device="meta"), RuntimeError, "got attn_mask on meta"),
    ],
    ids=["list", "device"],
)
def test_a_mask_that_is_none_is_named_beside_a_cache(mask, error, text):
    module, x = module_with(torch.float64), draw(N, L, E)
    cache = KeyValueCache(module, N)
    with pytest.raises(error, match=text):
        module(x, x, x, attn_mask=mask, cache=cache)
    assert cache.length == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_have_no_cache():
    module = module_with().eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad(), pytest.raises(ValueError, match="cache must be None with nested tensors"):
        module(nested, nested, nested, cache=KeyValueCache(module, 2))

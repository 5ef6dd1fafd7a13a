"""`KeyValueCache` with `ring=True`: it keeps what the module's window reaches back to, and drops the rest."""

import pytest
import torch

from decoding import L, N, assert_same, assert_unchanged, decode, draw, interrupt, state
from fused_mha import KeyValueCache
from options_oracle import EVERYTHING, E, module_with

WINDOWS = {"window": {"window": (3, 0)}, "its own key": {"window": (0, 0)}, "everything": EVERYTHING}


@pytest.mark.parametrize("chunks", [[1] * 30, [2] * 15, [12, 1, 1, 9, 1, 6], [30]], ids=str)
@pytest.mark.parametrize("config", WINDOWS.values(), ids=WINDOWS)
def test_a_ring_keeps_what_the_window_reaches_back_to(config, chunks):
    module, x = module_with(torch.float64, **config), draw(N, 30, E)
    cache = KeyValueCache(module, N, ring=True)
    expected, _ = module(x, x, x, is_causal=True)
    assert_same(decode(module, cache, x, chunks), expected)
    assert cache.length == 30
    assert cache.capacity == 2 * config["window"][0] + 1


@pytest.mark.parametrize("config", WINDOWS.values(), ids=WINDOWS)
def test_a_ring_of_elements_of_other_lengths(config):
    module, x = module_with(torch.float64, **config), draw(N, 40, E)
    expected, _ = module(x, x, x, is_causal=True)
    cache = KeyValueCache(module, N, ring=True)
    lengths = [0, 0]
    for size, counts in ((9, (9, 2)), (1, (1, 1)), (8, (3, 8)), (2, (0, 2)), (9, (9, 9)), (1, (1, 0)), (3, (3, 3))):
        chunk = torch.stack([x[n, lengths[n] : lengths[n] + size] for n in range(N)])
        padding = torch.arange(size) >= torch.tensor(counts)[:, None]
        call = {"need_weights": False, "is_causal": True, "cache": cache}
        with torch.no_grad():
            output, _ = module(chunk, chunk, chunk, key_padding_mask=padding if bool(padding.any()) else None, **call)
        for n, count in enumerate(counts):
            assert_same(output[n, :count], expected[n, lengths[n] : lengths[n] + count])
            lengths[n] += count
        assert cache.lengths.tolist() == lengths


def test_a_ring_takes_the_last_columns_of_a_mask():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 30, E)
    mask = draw(30, 30)
    expected, _ = module(x, x, x, is_causal=True, attn_mask=mask)
    cache = KeyValueCache(module, N, ring=True)
    for i in range(30):
        token = x[:, i : i + 1]
        row = mask[i : i + 1, : i + 1]
        output, _ = module(token, token, token, need_weights=False, attn_mask=row, cache=cache)
        assert_same(output, expected[:, i : i + 1])


def test_a_ring_gives_weights_until_it_drops_keys():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 8, E)
    cache = KeyValueCache(module, N, ring=True)
    expected = module(x, x, x, is_causal=True)[1]
    for first, last in ((0, 5), (5, 7)):
        chunk = x[:, first:last]
        weights = module(chunk, chunk, chunk, is_causal=True, cache=cache)[1]
        assert_same(weights, expected[:, first:last, :last])


@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_ring_that_a_failed_call_was_given_is_as_it_was(size):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 30, E)
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x[:, :7], 1)  # full
    before = state(cache)
    chunk = x[:, 7 : 7 + size]
    handle = module.out_proj.register_forward_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        module(chunk, chunk, chunk, need_weights=False, cache=cache)
    handle.remove()
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match="need_weights must be False once the ring has dropped keys, the first 4 for"):
        module(chunk, chunk, chunk, cache=cache)
    assert_unchanged(cache, before)
    assert_same(decode(module, cache, x[:, 7:], size), module(x, x, x, is_causal=True)[0][:, 7:])


def test_a_ring_is_truncated_to_what_it_keeps_or_to_nothing():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 22, E)
    expected = module(x, x, x, is_causal=True)[0]
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x[:, :20], [17, 1, 1, 1])
    cache.truncate([18, 19])
    later = torch.stack([x[0, 18:21], x[1, 19:22]])
    assert_same(decode(module, cache, later, 1), torch.stack([expected[0, 18:21], expected[1, 19:22]]))
    cache.truncate([0, 21])
    later = torch.stack([x[0, :1], x[1, 21:]])
    assert_same(decode(module, cache, later, 1), torch.stack([expected[0, :1], expected[1, 21:]]))
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0]
    assert_same(decode(module, cache, x, 11), expected)


def test_truncate_to_nothing_makes_a_ring_a_new_one():
    module, x = module_with(torch.float64, window=(2, 0)), draw(N, L, E)
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x, [1] * L)
    cache.truncate(0)
    assert cache.length == 0
    output, _ = module(x[:, :1], x[:, :1], x[:, :1], is_causal=True, attn_mask=torch.zeros(1, 1).bool(), cache=cache)
    assert_same(output, module(x[:, :1], x[:, :1], x[:, :1])[0])


def test_a_ring_keeps_a_short_element_when_the_longest_is_forgotten():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 30, E)
    expected = module(x, x, x, is_causal=True)[0]
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x[:, :8], 1)
    padding = torch.tensor([[False], [True]])
    for i in range(8, 20):  # the second element stays at 8 tokens
        token = torch.stack([x[0, i : i + 1], x[1, :1]])
        with torch.no_grad():
            module(token, token, token, key_padding_mask=padding, need_weights=False, is_causal=True, cache=cache)
    cache.truncate([0, 8])
    assert cache.lengths.tolist() == [0, 8]
    later = torch.stack([x[0, :9], x[1, 8:17]])
    assert_same(decode(module, cache, later, 1), torch.stack([expected[0, :9], expected[1, 8:17]]))


def test_a_ring_refuses_to_keep_what_padding_has_pushed_out():
    module, x = module_with(torch.float64, window=(2, 2)), draw(N, 8, E)
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x[:, :5], [2, 3])
    padding = torch.tensor([[False] * 3, [True] * 3])
    with torch.no_grad():
        module(*[x[:, 5:]] * 3, key_padding_mask=padding, need_weights=False, is_causal=True, cache=cache)
    assert cache.lengths.tolist() == [8, 5]
    with pytest.raises(ValueError, match=r"has dropped the first \[3, 3\]; got \[0, 4\]"):
        cache.truncate([0, 4])
    cache.truncate([0, 5])
    with pytest.raises(ValueError, match=r"has dropped the first \[0, 3\]; got \[0, 4\]"):
        cache.truncate([0, 4])
    cache.reorder(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"has dropped the first \[3, 0\]; got \[4, 0\]"):
        cache.truncate([4, 0])

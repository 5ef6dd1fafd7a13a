"""`KeyValueCache`: chunks of any sizes are all tokens at once, with every option, padding and change of a cache."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fused_mha
from fused_mha import KeyValueCache
from options_oracle import EVERYTHING, OPTIONS, E, module_with

from search import examples

N, L = 2, 11
CONFIGS = (
    {"no option": {}}
    | OPTIONS
    | {"everything": EVERYTHING, "virtual keys": {"add_bias_kv": True, "add_zero_attn": True}}
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
CHUNKS = {"one by one": [1] * L, "chunks": [4, 1, 1, 3, 2], "all": [L]}
every_size = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)


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


@every_size
@pytest.mark.parametrize("max_length", [None, L, 40])
@every_config
def test_chunks_give_what_all_tokens_give_at_once(config, max_length, chunks):
    module, x = module_with(torch.float64, **config), draw(N, L, E)
    cache = KeyValueCache(module, N, max_length=max_length)
    expected, _ = module(x, x, x, is_causal=True)
    assert_same(decode(module, cache, x, chunks), expected)
    assert cache.length == L
    assert cache.lengths.tolist() == [L] * N
    assert cache.capacity == (max_length or cache.capacity) >= L


@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_in_other_dtypes(dtype, chunks):
    module, x = module_with(dtype, **EVERYTHING), draw(N, L, E, dtype=dtype)
    expected, _ = module(x, x, x, is_causal=True)
    assert_same(decode(module, KeyValueCache(module, N), x, chunks), expected, dtype)


@every_config
def test_all_tokens_in_one_call_have_the_bits_of_a_call_without_a_cache(config):
    module, x = module_with(torch.float32, **config), draw(N, L, E, dtype=torch.float32)
    with torch.no_grad():
        expected = module(x, x, x, is_causal=True)
        output, weights = module(x, x, x, is_causal=True, cache=KeyValueCache(module, N))
    if not config:  # which takes one call
        assert_same((output, weights), expected, torch.float32)
        return
    assert torch.equal(output, expected[0])
    assert torch.equal(weights, expected[1])


@every_config
def test_weights_have_columns_for_all_tokens(config):
    module, x = module_with(torch.float64, **config), draw(N, L, E)
    cache = KeyValueCache(module, N)
    expected = module(x, x, x, is_causal=True)[1]
    decode(module, cache, x[:, :8], [5, 3])
    last = x[:, 8:]
    weights = module(last, last, last, is_causal=True, cache=cache)[1]
    assert_same(weights, expected[:, 8:])


@every_config
def test_a_mask_has_columns_for_all_tokens(config):
    module, x = module_with(torch.float64, **config), draw(N, L, E)
    mask = draw(N, module.num_heads, L, L)
    expected, _ = module(x, x, x, is_causal=True, attn_mask=mask)
    cache = KeyValueCache(module, N)
    for first, last in ((0, 6), (6, 7), (7, L)):
        chunk = x[:, first:last]
        of_chunk = mask[:, :, first:last, :last]
        output, _ = module(chunk, chunk, chunk, is_causal=True, attn_mask=of_chunk, cache=cache)
        assert_same(output, expected[:, first:last])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("config", [{}, EVERYTHING], ids=["no option", "everything"])
def test_layouts_keep_the_same(config, batch_first):
    module, x = module_with(torch.float64, **config), draw(N, L, E)
    expected, _ = module(x, x, x, is_causal=True)
    module.batch_first = batch_first
    whole, of_one = KeyValueCache(module, N), KeyValueCache(module, 1)
    for chunk in x.split([5, 1, 5], 1):
        given = chunk if batch_first else chunk.transpose(0, 1)
        output, _ = module(given, given, given, is_causal=True, cache=whole)
        output = output if batch_first else output.transpose(0, 1)
        row = chunk[0]
        assert_same(module(row, row, row, is_causal=True, cache=of_one)[0], output[0])
    assert_same(output, expected[:, 6:])


@pytest.mark.parametrize("chunks", [[1] * L, [4, 1, 1, 3, 2]], ids=["one by one", "chunks"])
@every_config
def test_padding_at_the_left_stays_hidden(config, chunks):
    module, x = module_with(torch.float64, **config), draw(N, L, E)
    padding = torch.arange(L) < torch.tensor([[0], [3]])
    expected, _ = module(x, x, x, is_causal=True, key_padding_mask=padding)
    cache = KeyValueCache(module, N)
    first = x[:, :4]
    with torch.no_grad():
        output, _ = module(first, first, first, is_causal=True, key_padding_mask=padding[:, :4], cache=cache)
    rest = decode(module, cache, x[:, 4:], 2)
    visible = ~padding
    assert_same(torch.cat((output, rest), 1)[visible], expected[visible])
    alone = x[1:, 3:]
    assert_same(rest[1:], module(alone, alone, alone, is_causal=True)[0][:, 1:])


@every_config
def test_padding_at_the_right_gives_way_to_the_next_tokens(config):
    module = module_with(torch.float64, **config)
    lengths, total = (5, 2), 5 + 4
    sequences = [draw(1, total, E)[:, : length + 4] * (1 + n) for n, length in enumerate(lengths)]
    prompt = torch.zeros(N, 5, E, dtype=torch.float64)
    for row, sequence, length in zip(prompt, sequences, lengths, strict=True):
        row[:length] = sequence[0, :length]
    padding = torch.arange(5) >= torch.tensor(lengths)[:, None]
    cache = KeyValueCache(module, N)
    with torch.no_grad():
        output, _ = module(prompt, prompt, prompt, is_causal=True, key_padding_mask=padding, cache=cache)
    assert cache.lengths.tolist() == [*lengths]
    later = torch.cat([sequence[:, -4:] for sequence in sequences])
    rest = decode(module, cache, later, [1, 3])
    for n, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        expected = module(sequence, sequence, sequence, is_causal=True)[0][0]
        assert_same(output[n, :length], expected[:length])
        assert_same(rest[n], expected[length:])


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


@pytest.mark.parametrize("length", [0, 3, 8, 50])
def test_truncation_forgets_the_last_tokens(length):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, draw(N, 8, E).flip(1) if not length else x[:, :8], 8)
    cache.truncate(length)
    kept = min(length, 8)
    assert cache.length == kept
    assert_same(decode(module, cache, x[:, kept:], 2), module(x, x, x, is_causal=True)[0][:, kept:])


def test_truncation_to_other_lengths_of_each():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, x[:, :8], 8)
    cache.truncate([3, 6])
    assert cache.lengths.tolist() == [3, 6]
    assert cache.length == 6  # the slots that no element needs are free
    later = torch.stack([x[0, 3:7], x[1, 6:10]])
    output, expected = decode(module, cache, later, [1, 3]), module(x, x, x, is_causal=True)[0]
    assert_same(output, torch.stack([expected[0, 3:7], expected[1, 6:10]]))
    cache.truncate(4)
    assert cache.lengths.tolist() == [4, 4]
    assert cache._hidden is cache._behind is None  # as of elements of one length
    assert_same(decode(module, cache, x[:, 4:], 2), expected[:, 4:])


@pytest.mark.parametrize("indices", [[1, 0], [1, 1, 0], [0]], ids=str)
def test_reordering_takes_elements_anew(indices):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, x[:, :8], 8)
    cache.truncate([5, 8])
    cache.reorder(torch.tensor(indices))
    assert cache.batch_size == len(indices)
    assert cache.lengths.tolist() == [(5, 8)[n] for n in indices]
    expected = module(x, x, x, is_causal=True)[0]
    later = torch.stack([x[n, (5, 8)[n] :][:3] for n in indices])
    assert_same(decode(module, cache, later, 1), torch.stack([expected[n, (5, 8)[n] :][:3] for n in indices]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_goes_its_own_way(duplicate):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, x[:, :6], 6)
    cache.truncate([4, 6])
    cache.truncate([4, 4])
    twin = duplicate(cache)
    assert repr(twin) == repr(cache)
    decode(module, twin, x.flip(1), 3)
    expected = module(x, x, x, is_causal=True)[0]
    assert_same(decode(module, cache, x[:, 4:], 2), expected[:, 4:])


def test_a_cache_moves_to_another_dtype():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    expected = module(x, x, x, is_causal=True)[0]
    cache = KeyValueCache(module, N)
    decode(module, cache, x[:, :6], 6)
    cache.truncate([6, 5])
    assert cache.to(dtype=torch.float32) is cache
    module, x = module.float(), x.float()
    output = decode(module, cache, torch.stack([x[0, 6:9], x[1, 5:8]]), 1)
    assert_same(output, torch.stack([expected[0, 6:9], expected[1, 5:8]]).float(), torch.float32)
    assert cache.to("meta")._keys.is_meta


def test_under_autocast_a_cache_has_autocasts_dtype():
    module, x = module_with(torch.float32, **EVERYTHING), draw(N, L, E, dtype=torch.float32)
    cache = KeyValueCache(module, N, dtype=torch.bfloat16)
    expected = module(x, x, x, is_causal=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decode(module, cache, x, [4, 1, 6])
    assert_same(output.float(), expected, torch.bfloat16)


def test_an_unpickled_cache_is_of_the_module_that_it_is_first_given_to():
    module, x = module_with(torch.float64), draw(N, 1, E)
    cache = pickle.loads(pickle.dumps(KeyValueCache(module, N)))
    module(x, x, x, cache=cache)
    other = copy.deepcopy(module)
    with pytest.raises(ValueError, match="cache must be one of this module"):
        other(x, x, x, cache=cache)


def test_a_cache_made_in_inference_mode_serves_outside_of_it():
    module, x = module_with(torch.float64), draw(N, 1, E)
    with torch.inference_mode():
        cache = KeyValueCache(module, N, max_length=4)
    with torch.no_grad():
        module(x, x, x, cache=cache)
    assert cache.length == 1


@pytest.mark.parametrize("max_length", [None, 40])
def test_inference_mode_and_no_grad_may_take_turns(max_length):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 40, E)
    cache = KeyValueCache(module, N, max_length=max_length)
    expected = module(x, x, x, is_causal=True)[0]
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for i, chunk in enumerate(x.split(5, 1)):
        with modes[i % 3]():
            output, _ = module(chunk, chunk, chunk, need_weights=False, is_causal=True, cache=cache)
        assert_same(output, expected[:, 5 * i : 5 * i + 5])


def test_gradients_reach_the_tokens_of_the_same_call_alone():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N, max_length=L)
    first, last = x[:, :6].clone().requires_grad_(), x[:, 6:9].clone().requires_grad_()
    early, _ = module(first, first, first, is_causal=True, cache=cache)
    late, _ = module(last, last, last, is_causal=True, cache=cache)
    (of_last,) = torch.autograd.grad(late.sum(), last, retain_graph=True)
    assert torch.autograd.grad(late.sum(), first, allow_unused=True, retain_graph=True) == (None,)
    both = torch.cat((x[:, :6], last), 1)
    (expected,) = torch.autograd.grad(module(both, both, both, is_causal=True)[0][:, 6:].sum(), last)
    assert_same(of_last, expected)
    token = x[:, 9:10]
    module(token, token, token, is_causal=True, cache=cache)  # writes beside what is saved
    (of_first,) = torch.autograd.grad(early.sum(), first)
    whole = x[:, :6].clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(whole, whole, whole, is_causal=True)[0].sum(), whole)
    assert_same(of_first, expected)


ROTARY_WINDOW = {"window": (3, 0), "rope": fused_mha.RotaryEmbedding(2)}
# A module's options, a cache's arguments, whether tokens are padding, and the most graphs for all lengths.
COMPILED = {
    "no option": ({}, {"max_length": 64}, False, 2),
    "everything": (EVERYTHING, {"max_length": 64}, False, 2),
    "padding": (ROTARY_WINDOW, {"max_length": 64}, True, 4),
    "growing": (ROTARY_WINDOW, {}, False, 5),
    "ring": (ROTARY_WINDOW, {"ring": True}, False, 7),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("config", "arguments", "pads", "most"), COMPILED.values(), ids=COMPILED)
def test_a_compiled_module_is_not_compiled_at_each_length(config, arguments, pads, most):
    module, x = module_with(torch.float64, **config), draw(N, 50, E)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    cache, twin = KeyValueCache(module, N, **arguments), KeyValueCache(module, N, **arguments)
    padding = {}
    for i in range(50):
        token = x[:, i : i + 1].clone()
        if pads:
            padding = {"key_padding_mask": torch.tensor([[i % 4 == 1], [i % 4 == 2]])}
        with torch.no_grad():
            call = {"need_weights": False, "is_causal": True, **padding}
            output, _ = compiled(token, token, token, cache=cache, **call)
            expected, _ = module(token, token, token, cache=twin, **call)
        assert_same(output, expected)
    assert cache.lengths.tolist() == twin.lengths.tolist()
    assert counter.frame_count <= most


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


def state(cache):
    """All that a later call can see."""
    kept = [x[:, : cache._stored].clone() for x in (cache._keys, cache._values)]
    return kept, cache.length, cache.lengths, cache._hidden, cache._stored


def assert_unchanged(cache, before):
    torch.testing.assert_close(state(cache), before, rtol=0, atol=0)


def _raise(*_):
    raise KeyboardInterrupt


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
    handle = module.out_proj.register_forward_hook(_raise) if error is KeyboardInterrupt else None
    with torch.no_grad(), pytest.raises(error, match=text):
        module(**{"query": query, "key": query, "value": query} | call, cache=cache)
    if handle is not None:
        handle.remove()
    assert_unchanged(cache, before)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_a_ring_that_a_failed_call_was_given_is_as_it_was(size):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 30, E)
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x[:, :7], 1)  # full
    before = state(cache)
    chunk = x[:, 7 : 7 + size]
    handle = module.out_proj.register_forward_hook(_raise)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        module(chunk, chunk, chunk, need_weights=False, cache=cache)
    handle.remove()
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match="need_weights must be False once the ring has dropped keys, the first 4 for"):
        module(chunk, chunk, chunk, cache=cache)
    assert_unchanged(cache, before)
    assert_same(decode(module, cache, x[:, 7:], size), module(x, x, x, is_causal=True)[0][:, 7:])


def test_a_ring_gives_weights_until_it_drops_keys():
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, 8, E)
    cache = KeyValueCache(module, N, ring=True)
    expected = module(x, x, x, is_causal=True)[1]
    for first, last in ((0, 5), (5, 7)):
        chunk = x[:, first:last]
        weights = module(chunk, chunk, chunk, is_causal=True, cache=cache)[1]
        assert_same(weights, expected[:, first:last, :last])


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (-1, r"length must be a count of tokens, or \(N\) = \(2,\) counts; got -1"),
        ([1, 2, 3], r"got \[1, 2, 3\]"),
        (1.0, "got 1.0"),
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


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        (torch.tensor([0, 2]), r"indices must be in \[0, batch_size = 2\); got \[0, 2\]"),
        (torch.tensor([[0]]), r"indices must be \(M\) of an integer dtype; got \(1, 1\), torch.int64"),
        (torch.tensor([0.0]), r"indices must be \(M\) of an integer dtype; got \(1,\), torch.float32"),
    ],
    ids=str,
)
def test_a_mistake_in_reordering_is_named(indices, text):
    with pytest.raises(ValueError, match=text):
        KeyValueCache(module_with(), N).reorder(indices)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_have_no_cache():
    module = module_with().eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad(), pytest.raises(ValueError, match="cache must be None with nested tensors"):
        module(nested, nested, nested, cache=KeyValueCache(module, 2))


def test_the_explanation_of_a_call_with_a_cache_keeps_nothing():
    module, x = module_with(), draw(N, 3, E, dtype=torch.float32)
    cache = KeyValueCache(module, N)
    explanation = fused_mha.explain(module, x, cache=cache)
    assert explanation.projections.endswith("apart from the attention: one call serves no cache")
    assert cache.length == 0


@settings(max_examples=examples(60))
@given(st.data())
def test_any_sequence_of_steps_is_what_each_element_gives_alone(data):
    config = data.draw(st.sampled_from([*CONFIGS.values()]))
    module = module_with(torch.float64, **config)
    left = (config.get("window") or (None,))[0]
    cache = KeyValueCache(module, N, ring=left is not None and data.draw(st.booleans()))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    elements = [torch.zeros(0, E, dtype=torch.float64) for _ in range(N)]  # the tokens of each
    for _ in range(data.draw(st.integers(1, 8))):
        step = data.draw(st.sampled_from(["tokens", "tokens", "truncate", "reorder"]))
        if step == "tokens":
            size = data.draw(st.integers(1, 6))
            counts = [data.draw(st.integers(0, size)) for _ in elements]
            chunk = torch.randn(len(elements), size, E, generator=generator, dtype=torch.float64)
            padding = torch.arange(size) >= torch.tensor(counts)[:, None]
            given_padding = padding if bool(padding.any()) or data.draw(st.booleans()) else None
            with torch.no_grad():
                output, _ = module(
                    chunk,
                    chunk,
                    chunk,
                    key_padding_mask=given_padding,
                    need_weights=False,
                    is_causal=True,
                    cache=cache,
                )
            for n, count in enumerate(counts):
                elements[n] = torch.cat((elements[n], chunk[n, :count]))
                if count:
                    x = elements[n]
                    expected, _ = module(x, x, x, is_causal=True)
                    assert_same(output[n, :count], expected[-count:].detach())
        elif step == "truncate":
            lengths = [data.draw(st.integers(0, len(x) + 1)) for x in elements]
            if cache._reach is not None and cache._dropped:  # what a ring has dropped, tests above ask
                lengths = [len(x) if length else 0 for x, length in zip(elements, lengths, strict=True)]
            cache.truncate(lengths)
            elements = [x[:length] for x, length in zip(elements, lengths, strict=True)]
        else:
            indices = data.draw(st.lists(st.integers(0, len(elements) - 1), min_size=1, max_size=3))
            cache.reorder(torch.tensor(indices))
            elements = [elements[n] for n in indices]
        assert cache.lengths.tolist() == [len(x) for x in elements]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder(torch.tensor([1, 0])),
        lambda cache: cache.to(dtype=torch.float32).to(dtype=torch.float64),
        lambda cache: cache.truncate(2),
    ],
    ids=["reorder", "to", "truncate"],
)
def test_what_is_changed_under_inference_mode_takes_tokens_outside_of_it(change):
    module, x = module_with(torch.float64), draw(N, L, E)
    cache = KeyValueCache(module, N, max_length=L)
    with torch.inference_mode():
        module(x[:, :3], x[:, :3], x[:, :3], need_weights=False, cache=cache)
        change(cache)
        twin = copy.deepcopy(cache)
    for each in (cache, twin):
        decode(module, each, x[:, 3:], [L - 3])


def test_reorder_to_shorter_elements_gives_their_slots_back():
    module, x = module_with(torch.float64), draw(N, L, E)
    cache = KeyValueCache(module, N, max_length=6)
    decode(module, cache, x[:, :6], [6])
    cache.truncate([6, 2])
    cache.reorder(torch.tensor([1, 1]))
    assert cache.length == 2
    assert cache.lengths.tolist() == [2, 2]
    found = decode(module, cache, x[[1, 1], 2:6], [1, 3])
    assert_same(found, module(x[[1, 1], :6], x[[1, 1], :6], x[[1, 1], :6], is_causal=True)[0][:, 2:])


def test_truncate_to_nothing_makes_a_ring_a_new_one():
    module, x = module_with(torch.float64, window=(2, 0)), draw(N, L, E)
    cache = KeyValueCache(module, N, ring=True)
    decode(module, cache, x, [1] * L)
    cache.truncate(0)
    assert cache.length == 0
    output, _ = module(x[:, :1], x[:, :1], x[:, :1], is_causal=True, attn_mask=torch.zeros(1, 1).bool(), cache=cache)
    assert_same(output, module(x[:, :1], x[:, :1], x[:, :1])[0])


def test_a_module_with_a_replaced_out_proj_has_a_cache():
    module, x = module_with(torch.float64), draw(N, L, E)
    module.out_proj = torch.nn.Sequential(module.out_proj)
    assert decode(module, KeyValueCache(module, N), x, [L]).shape == x.shape


def test_rope_takes_views_of_one_sequence():
    module, x = module_with(torch.float64, **OPTIONS["rotary half"]), draw(N, L, E)
    expected = module(x, x, x)[0]
    assert_same(module(x[:], x[:], x[:])[0], expected)
    program = torch.export.export(module, (x[:], x[:], x[:]), strict=False).module()
    assert_same(program(x, x, x)[0], expected)


def test_a_copy_shares_no_memory():
    module, x = module_with(torch.float64), draw(N, L, E)
    cache = KeyValueCache(module, N, max_length=L)
    decode(module, cache, x[:, :3], [3])
    twin = copy.copy(cache)
    decode(module, twin, -x[:, 3:5], [2])
    assert_same(decode(module, cache, x[:, 3:], [L - 3]), module(x, x, x, is_causal=True)[0][:, 3:])


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

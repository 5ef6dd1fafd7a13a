"""A `KeyValueCache` that is truncated, reordered, copied, pickled or moved, or used in several modes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import CONFIGS, L, N, assert_same, decode, draw
from fused_mha import KeyValueCache
from options_oracle import EVERYTHING, E, module_with

from search import examples


@pytest.mark.parametrize("length", [0, 3, 8, 50])
def test_truncation_forgets_the_last_tokens(length):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, draw(N, 8, E).flip(1) if not length else x[:, :8], 8)
    cache.truncate(length)
    kept = min(length, 8)
    assert cache.length == kept
    assert_same(decode(module, cache, x[:, kept:], 2), module(x, x, x, is_causal=True)[0][:, kept:])


@pytest.mark.parametrize("length", [0, 2, 6])
def test_truncation_keeps_the_padding_at_the_left(length):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    padding = torch.arange(L) < torch.tensor([[0], [3]])
    cache = KeyValueCache(module, N)
    for end in (8, L):
        chunk, of_chunk = x[:, cache.length : end], padding[:, cache.length : end]
        with torch.no_grad():
            output, _ = module(chunk, chunk, chunk, is_causal=True, key_padding_mask=of_chunk, cache=cache)
        cache.truncate(length)
        assert cache.length == length
    expected, _ = module(x, x, x, is_causal=True, key_padding_mask=padding)
    visible = ~padding[:, length:]
    assert_same(output[visible], expected[:, length:][visible])


def test_truncation_of_elements_of_one_length_moves_nothing():
    module, x = module_with(torch.float64), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, x, L)
    before = cache._keys._version
    cache.truncate(3)
    assert cache._keys._version == before


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("indices", [[1, 0], [1, 1, 0], [0]], ids=str)
def test_reordering_takes_elements_anew(indices, dtype):
    module, x = module_with(torch.float64, **EVERYTHING), draw(N, L, E)
    cache = KeyValueCache(module, N)
    decode(module, cache, x[:, :8], 8)
    cache.truncate([5, 8])
    cache.reorder(torch.tensor(indices, dtype=dtype))
    assert cache.batch_size == len(indices)
    assert cache.lengths.tolist() == [(5, 8)[n] for n in indices]
    expected = module(x, x, x, is_causal=True)[0]
    later = torch.stack([x[n, (5, 8)[n] :][:3] for n in indices])
    assert_same(decode(module, cache, later, 1), torch.stack([expected[n, (5, 8)[n] :][:3] for n in indices]))


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


COPIES = {"copy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
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


def test_a_copy_shares_no_memory():
    module, x = module_with(torch.float64), draw(N, L, E)
    cache = KeyValueCache(module, N, max_length=L)
    decode(module, cache, x[:, :3], [3])
    twin = copy.copy(cache)
    decode(module, twin, -x[:, 3:5], [2])
    assert_same(decode(module, cache, x[:, 3:], [L - 3]), module(x, x, x, is_causal=True)[0][:, 3:])


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_of_the_module_that_it_is_first_given_to(duplicate):
    module, x = module_with(torch.float64), draw(N, 1, E)
    other, cache = duplicate((module, KeyValueCache(module, N)))
    cache = duplicate(cache)
    other(x, x, x, cache=cache)
    with pytest.raises(ValueError, match="cache must be one of this module"):
        module(x, x, x, cache=cache)


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


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.bfloat16,), {}),
        (("cpu", torch.bfloat16), {}),
        ((None, torch.bfloat16), {}),
        ((torch.zeros(1, dtype=torch.bfloat16),), {}),
        (("cpu",), {"dtype": torch.bfloat16}),
    ],
    ids=["dtype", "device and dtype", "None and dtype", "tensor", "keyword"],
)
def test_a_cache_moves_by_what_a_module_moves_by(args, kwargs):
    module = module_with(torch.float32)
    cache = KeyValueCache(module, N).to(*args, **kwargs)
    module.to(*args, **kwargs)
    x = draw(N, 2, E).bfloat16()
    module(x, x, x, need_weights=False, cache=cache)
    assert cache.length == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_a_dtype_that_no_keys_have_is_refused(dtype):
    cache = KeyValueCache(module_with(torch.float32), N)
    with pytest.raises(TypeError, match=f"dtype must be a floating one; got {dtype}"):
        cache.to(dtype=dtype)
    assert cache._keys.dtype == cache._values.dtype == torch.float32


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
            of_all = data.draw(st.booleans()) and not (cache._reach is not None and cache._dropped)
            lengths = lengths[:1] * len(lengths) if of_all else lengths
            if cache._reach is not None and cache._dropped:  # what a ring has dropped, tests above ask
                lengths = [len(x) if length else 0 for x, length in zip(elements, lengths, strict=True)]
            cache.truncate(lengths[0] if of_all else lengths)
            elements = [x[:length] for x, length in zip(elements, lengths, strict=True)]
        else:
            indices = data.draw(st.lists(st.integers(0, len(elements) - 1), min_size=1, max_size=3))
            cache.reorder(torch.tensor(indices))
            elements = [elements[n] for n in indices]
        assert cache.lengths.tolist() == [len(x) for x in elements]

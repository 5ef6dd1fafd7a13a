"""`KeyValueCache`: chunks of any sizes are all tokens at once, with every option, mask and padding, and compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fused_mha
from decoding import L, N, assert_same, decode, draw, every_config
from fused_mha import KeyValueCache
from options_oracle import EVERYTHING, E, module_with

CHUNKS = {"one by one": [1] * L, "chunks": [4, 1, 1, 3, 2], "all": [L]}
every_size = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)


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


def test_under_autocast_a_cache_has_autocasts_dtype():
    module, x = module_with(torch.float32, **EVERYTHING), draw(N, L, E, dtype=torch.float32)
    cache = KeyValueCache(module, N, dtype=torch.bfloat16)
    expected = module(x, x, x, is_causal=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decode(module, cache, x, [4, 1, 6])
    assert_same(output.float(), expected, torch.bfloat16)


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


@pytest.mark.thorough(one_in=2)
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
            padding = {"key_padding_mask": torch.tensor([[i % 4 == 1], [i % 2 == 1]])}
        with torch.no_grad():
            call = {"need_weights": False, "is_causal": True, **padding}
            output, _ = compiled(token, token, token, cache=cache, **call)
            expected, _ = module(token, token, token, cache=twin, **call)
        assert_same(output, expected)
    assert cache.lengths.tolist() == twin.lengths.tolist()
    assert cache.length == twin.length  # slots that no element needs are free
    assert counter.frame_count <= most


@pytest.mark.thorough(one_in=3)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("arguments", [{"max_length": 12}, {"ring": True}], ids=str)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_call_gives_the_slots_of_padding_back(fullgraph, arguments):
    module, x = module_with(torch.float64, **ROTARY_WINDOW), draw(N, 15, E)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=fullgraph)
    cache, twin = KeyValueCache(module, N, **arguments), KeyValueCache(module, N, **arguments)
    for i, counts in enumerate([(3, 1), (1, 3), (2, 2), (3, 3), (0, 2)]):
        chunk, padding = x[:, 3 * i : 3 * i + 3].clone(), torch.arange(3) >= torch.tensor(counts)[:, None]
        with torch.no_grad():
            call = {"need_weights": False, "is_causal": True, "key_padding_mask": padding}
            output, _ = compiled(chunk, chunk, chunk, cache=cache, **call)
            expected, _ = module(chunk, chunk, chunk, cache=twin, **call)
        assert_same(output[~padding], expected[~padding])
        assert cache.lengths.tolist() == twin.lengths.tolist()
        assert cache.length == twin.length == max(twin.lengths)


def test_the_explanation_of_a_call_with_a_cache_keeps_nothing():
    module, x = module_with(), draw(N, 3, E, dtype=torch.float32)
    cache = KeyValueCache(module, N)
    explanation = fused_mha.explain(module, x, cache=cache)
    assert explanation.projections.endswith("apart from the attention: one call serves no cache")
    assert cache.length == 0


def test_a_module_with_a_replaced_out_proj_has_a_cache():
    module, x = module_with(torch.float64), draw(N, L, E)
    module.out_proj = torch.nn.Sequential(module.out_proj)
    assert decode(module, KeyValueCache(module, N), x, [L]).shape == x.shape

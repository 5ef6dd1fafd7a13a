"""Options of `MultiHeadAttention` against an oracle in plain torch operators: alone, in pairs, in random calls."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_mha
from options_oracle import OPTIONS, E, H, assert_matches, module_with

from search import examples

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


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_averaged_weights_are_the_mean_of_those_of_the_heads(config):
    module, inputs = module_with(**config), self_attention()
    assert_matches(module, config, inputs, is_causal=True, average_attn_weights=True)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_the_output_without_weights_is_that_of_the_oracle(config):
    module, inputs = module_with(torch.float64, **config), self_attention(torch.float64)
    assert_matches(module, config, inputs, need_weights=False, is_causal=True, key_padding_mask=PADDING)


WITHOUT_ROPE = {name: config for name, config in OPTIONS.items() if "rope" not in config}
SHARINGS = {
    "keys and values": lambda: (draw(N, 5, E), *(draw(N, L, E, seed=2),) * 2),
    "separate": lambda: (draw(N, 5, E), draw(N, L, E, seed=2), draw(N, L, E, seed=3)),
    "other sizes": lambda: (draw(N, 5, E), draw(N, L, 5, seed=2), draw(N, L, 8, seed=3)),
}


@pytest.mark.parametrize("inputs", SHARINGS.values(), ids=SHARINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", WITHOUT_ROPE.values(), ids=WITHOUT_ROPE)
def test_queries_and_keys_may_differ(config, bias, inputs):
    query, key, value = inputs()
    module = module_with(kdim=key.shape[2], vdim=value.shape[2], bias=bias, **config)
    assert_matches(module, config, (query, key, value), key_padding_mask=PADDING)


@pytest.mark.parametrize("value", ["value", "query"])
def test_rope_takes_values_of_their_own(value):
    config = OPTIONS["rotary half"]
    x = draw(N, L, E)
    assert_matches(module_with(**config), config, (x, x, draw(N, L, E, seed=2) if value == "value" else x))


@pytest.mark.parametrize("shape", [(L,), (N, L)], ids=["of all", "of each"])
@pytest.mark.parametrize("name", ["rotary half", "rotary interleaved"])
def test_positions_may_be_given(name, shape):
    positions = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(0))
    assert_matches(module_with(**OPTIONS[name]), OPTIONS[name], self_attention(), positions=positions)


@pytest.mark.parametrize("config", [*OPTIONS.values(), *PAIRS.values()], ids=[*OPTIONS, *PAIRS])
def test_layouts_give_one_result(config):
    module, x = module_with(**config, add_bias_kv=True), draw(N, L, E)
    positions = {"positions": torch.arange(L) * 3} if "rope" in config else {}
    expected = module(x, x, x, key_padding_mask=PADDING, **positions)
    module.batch_first = False
    turned = x.transpose(0, 1)
    output, weights = module(turned, turned, turned, key_padding_mask=PADDING, **positions)
    assert output.is_contiguous()
    torch.testing.assert_close((output.transpose(0, 1), weights), expected)
    for n in range(N):
        row = x[n]
        output, weights = module(row, row, row, key_padding_mask=PADDING[n], **positions)
        torch.testing.assert_close((output, weights), (expected[0][n], expected[1][n]))


@st.composite
def configurations(draw):
    """Any combination of options, with the arguments of torch's module and of a call."""
    kv_heads = draw(st.sampled_from([None, 1, 2, 4]))
    head_dim = draw(st.sampled_from([None, 2, 5, 8]))
    D = head_dim or E // H
    rotated = draw(st.sampled_from([None, *range(2, D + 1, 2)]))
    rope = None
    if rotated is not None:
        layout = draw(st.sampled_from(["half", "interleaved"]))
        scaling = draw(st.sampled_from([None, fused_mha.LinearScaling(3.0)]))
        rope = fused_mha.RotaryEmbedding(rotated, base=30.0, layout=layout, scaling=scaling)
    side = st.sampled_from([None, 0, 1, 3])
    config = {
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_head_dim": draw(st.sampled_from([None, 1, 4])),
        "window": draw(st.one_of(st.none(), st.tuples(side, side))),
        "softcap": draw(st.sampled_from([None, 0.3, 5.0])),
        "sinks": draw(st.booleans()),
        "rope": rope,
        "qk_norm": draw(st.sampled_from([None, "rms", "layer", "l2"])),
        "alibi": draw(st.sampled_from([False, True, (0.1, 2.0, -0.5, 0.0)])),
        "gate": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    call = {"is_causal": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    if draw(st.booleans()):
        call["key_padding_mask"] = PADDING
    if draw(st.booleans()):
        call["attn_mask"] = CALLS[draw(st.sampled_from(["float mask", "causal, padding, mask"]))]["attn_mask"]
    if rope is not None and draw(st.booleans()):
        call["positions"] = torch.arange(N * L).view(N, L) % 9
    return config, call, draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))


@settings(max_examples=examples(150))
@given(configurations())
def test_any_combination_is_that_of_the_oracle(case):
    config, call, dtype = case
    assert_matches(module_with(dtype, **config), config, self_attention(dtype), **call)

"""`attention`'s ``weights_of_heads``: the weights of the heads that are named, alone and in their order."""

import pytest
import torch

import fused_mha
from attention_oracle import (
    SERVE_EVERYTHING,
    assert_matches_oracle,
    can_serve,
    explain_attention,
    make_arguments,
)

CALLS = {
    "plain": {},
    "one key head": {"H_kv": 1},
    "as many key heads": {"H_kv": 4},
    "causal": {"is_causal": True, "L": 6, "S": 6},
    "window, bottom right": {"window": (2, 1), "causal_alignment": "bottom_right", "L": 5, "S": 9},
    "masks": {"mask_dtype": torch.float32, "mask_shape": "NHLS", "padding_dtype": torch.bool},
    "hidden rows": {"mask_dtype": torch.bool, "mask_shape": "HLS", "hidden": 0.8},
    "virtual keys": {"bias_kv": True, "add_zero_attn": True, "mask_dtype": torch.bool},
    "softcap, sinks and ALiBi": {"softcap": 2.0, "of_heads": ("sinks", "alibi_slopes")},
    "one query": {"L": 1, "S": 40},
    "one query, few keys": {"L": 1, "S": 3},
    "few keys": {"L": 40, "S": 2},
    "several tiles": {"L": 70, "S": 150, "D": 8, "D_v": 8},
    "several chunks of keys": {"N": 1, "L": 5, "S": 530},
    "an empty batch": {"N": 0},
    "no query": {"L": 0},
}
HEADS = [(0,), (3, 0), (1, 2), (2, 3, 0, 1)]

each_back_end = pytest.mark.parametrize("backend", SERVE_EVERYTHING)
each_choice = pytest.mark.parametrize("heads", HEADS, ids=str)


@pytest.mark.thorough(one_in=5)
@each_back_end
@each_choice
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_and_gradients_match_the_oracle(call, dtype, heads, backend):
    assert_matches_oracle(make_arguments(dtype=dtype, **call, weights_of_heads=heads, return_lse=True), backend)


@each_back_end
@each_choice
def test_they_are_those_of_all_heads(backend, heads):
    arguments = make_arguments(L=33, S=70, D=8, H_kv=2, is_causal=True)
    with fused_mha.backend(backend):
        some = fused_mha.attention(**arguments, weights_of_heads=heads)
        every = fused_mha.attention(**arguments, need_weights=True, average_attn_weights=False)
    assert some.weights.shape == (2, len(heads), 33, 70)
    assert torch.equal(some.weights, every.weights[:, list(heads)])
    assert torch.equal(some.output, every.output)
    assert some.lse is None


@each_back_end
def test_dropout_is_that_of_all_heads(backend):
    arguments = make_arguments(L=12, S=40, dropout_p=0.4)
    results = []
    for wanted in ({"weights_of_heads": (3, 1)}, {"need_weights": True, "average_attn_weights": False}):
        torch.manual_seed(1)
        with fused_mha.backend(backend):
            results.append(fused_mha.attention(**arguments, **wanted))
    some, every = results
    assert torch.equal(some.weights, every.weights[:, [3, 1]])
    assert bool((some.weights == 0).any())
    assert torch.equal(some.output, every.output)


@each_back_end
def test_a_loss_of_the_weights_alone_has_no_gradient_in_other_heads(backend):
    arguments = make_arguments(L=9, S=20, H_kv=4)
    query, key, value = (arguments[name].requires_grad_() for name in ("query", "key", "value"))
    with fused_mha.backend(backend):
        weights = fused_mha.attention(**arguments, weights_of_heads=(2,)).weights
    of_query, of_key, of_value = torch.autograd.grad(weights.square().sum(), (query, key, value), allow_unused=True)
    assert of_value is None or not of_value.any()
    for gradient in (of_query, of_key):
        assert [bool(gradient[:, :, h].any()) for h in range(4)] == [False, False, True, False]


def test_alignment_of_speech_by_the_heads_that_follow_it():
    """As Whisper times words: the mean over some heads of a decoder's attention to the audio, standardised."""
    N, tokens, frames, alignment_heads = 1, 7, 60, (5, 1, 4)
    arguments = make_arguments(N=N, L=tokens, S=frames, H=6, H_kv=6, D=16, D_v=16)

    def alignment(weights):
        deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
        return ((weights - mean) / deviation).mean(dim=1)

    some = fused_mha.attention(**arguments, weights_of_heads=alignment_heads).weights
    every = fused_mha.attention(**arguments, need_weights=True, average_attn_weights=False).weights
    torch.testing.assert_close(alignment(some), alignment(every[:, list(alignment_heads)]))


def test_autocast_gives_the_weights_of_the_lower_precision():
    arguments = make_arguments(D=8)
    with torch.autocast("cpu", torch.bfloat16):
        weights = fused_mha.attention(**arguments, weights_of_heads=(1, 3)).weights
    assert weights.dtype == torch.bfloat16
    narrow = {name: x.bfloat16() for name, x in arguments.items()}
    assert torch.equal(weights, fused_mha.attention(**narrow, weights_of_heads=(1, 3)).weights)


def test_vmap_and_grad_take_them():
    arguments = make_arguments(N=3, D=8)

    def loss(query, key, value):
        given = (x.unsqueeze(0) for x in (query, key, value))
        return fused_mha.attention(*given, weights_of_heads=(3, 1)).weights.square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(*arguments.values())
    for n in range(3):
        query, key, value = (x[n].detach().requires_grad_() for x in arguments.values())
        (expected,) = torch.autograd.grad(loss(query, key, value), query)
        torch.testing.assert_close(each[n], expected)


def test_lists_and_ranges_name_heads_too():
    arguments = make_arguments()
    expected = fused_mha.attention(**arguments, weights_of_heads=(1, 2)).weights
    for heads in ([1, 2], range(1, 3)):
        assert torch.equal(fused_mha.attention(**arguments, weights_of_heads=heads).weights, expected)


MISTAKES = [
    ((), ValueError, "weights_of_heads must name a head at least, or be None for the weights of all; got none"),
    ((0, 4), IndexError, r"weights_of_heads must name heads from 0 to H - 1 = 3; got \(0, 4\)"),
    ((-1,), IndexError, r"weights_of_heads must name heads from 0 to H - 1 = 3; got \(-1,\)"),
    ((1, 0, 1), ValueError, r"weights_of_heads must name a head once; got \(1, 0, 1\)"),
    ((True, False), TypeError, r"weights_of_heads must be a tuple of ints, such as \(0, 3\); got \(True, False\)"),
    ((0.0,), TypeError, r"weights_of_heads must be a tuple of ints, such as \(0, 3\); got \(0.0,\)"),
    (2, TypeError, r"weights_of_heads must be a tuple of ints, such as \(0, 3\); got 2"),
    ("01", TypeError, r"weights_of_heads must be a tuple of ints, such as \(0, 3\); got '01'"),
    (torch.tensor([0, 1]), TypeError, r"weights_of_heads must be a tuple of ints, .*; got tensor"),
]


@pytest.mark.parametrize(("heads", "error", "text"), MISTAKES, ids=[str(heads) for heads, _, _ in MISTAKES])
def test_a_mistake_is_named(heads, error, text):
    with pytest.raises(error, match=text):
        fused_mha.attention(**make_arguments(), weights_of_heads=heads)


def test_averaged_weights_are_refused_beside_them():
    arguments = make_arguments(weights_of_heads=(0, 3), need_weights=True)
    text = r"no mean over heads: give average_attn_weights=False beside it; got .*weights_of_heads=\(0, 3\)"
    with pytest.raises(ValueError, match=text):
        fused_mha.attention(**arguments)
    assert fused_mha.attention(**arguments, average_attn_weights=False).weights.shape[1] == 2


def test_a_back_end_without_weights_cannot_serve_them():
    arguments = make_arguments(weights_of_heads=(0,))
    assert not can_serve("sdpa", arguments)
    assert explain_attention(**arguments).reasons["sdpa"] == ["it returns no attention weights (weights_of_heads=(0,))"]
    with fused_mha.backend("sdpa"), pytest.raises(RuntimeError, match="it returns no attention weights"):
        fused_mha.attention(**arguments)

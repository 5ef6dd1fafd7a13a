"""`fused_mha.core.masks`: what each mask means, as grids one can read."""

import pytest
import torch

from fused_mha.core import masks

INF = float("inf")


def visible(L, S, is_causal=False, alignment="top_left", window=None):
    band = masks.outside_band(L, S, is_causal, alignment, window, torch.device("cpu"))
    return None if band is None else (~band).int().tolist()


def bias_of(attn_mask=None, key_padding_mask=None, *, is_causal=False, window=None, virtual_keys=0, L=2, S=3):
    return masks.attention_bias(
        L,
        S,
        attn_mask,
        key_padding_mask,
        is_causal,
        "top_left",
        window,
        virtual_keys,
        torch.float32,
        torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"L": 2, "S": 4, "is_causal": True}, [[1, 0, 0, 0], [1, 1, 0, 0]]),
        ({"L": 2, "S": 4, "is_causal": True, "alignment": "bottom_right"}, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ({"L": 3, "S": 2, "is_causal": True}, [[1, 0], [1, 1], [1, 1]]),
        ({"L": 3, "S": 2, "is_causal": True, "alignment": "bottom_right"}, [[0, 0], [1, 0], [1, 1]]),
        ({"L": 3, "S": 3, "window": (1, 0)}, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        ({"L": 3, "S": 3, "window": (0, 1)}, [[1, 1, 0], [0, 1, 1], [0, 0, 1]]),
        ({"L": 3, "S": 3, "window": (None, 0)}, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        ({"L": 3, "S": 3, "window": (0, None)}, [[1, 1, 1], [0, 1, 1], [0, 0, 1]]),
        ({"L": 2, "S": 4, "window": (1, 0), "alignment": "bottom_right"}, [[0, 1, 1, 0], [0, 0, 1, 1]]),
        ({"L": 3, "S": 3, "window": (1, 2), "is_causal": True}, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        ({"L": 0, "S": 2, "is_causal": True}, []),
        ({"L": 1, "S": 0, "is_causal": True}, [[]]),
    ],
    ids=str,
)
def test_outside_band_hides_all_but_the_band(arguments, expected):
    assert visible(**arguments) == expected


@pytest.mark.parametrize("window", [None, (None, None)])
def test_outside_band_is_none_where_nothing_can_be_hidden(window):
    assert visible(2, 3, window=window) is None


@pytest.mark.parametrize(
    "mask",
    [torch.tensor([[False, True]]), torch.tensor([[-1e30, -INF]]), torch.tensor([[0.0, -INF]]).half()],
    ids=["bool", "float", "half"],
)
def test_hidden_keys_are_true_or_minus_infinity(mask):
    assert masks.hidden_keys(mask).tolist() == [[False, True]]


def test_attention_bias_is_none_without_masks():
    assert bias_of() is None
    assert bias_of(virtual_keys=2) is None


def test_attention_bias_adds_floats_and_hides_by_bools():
    attn_mask = torch.tensor([[False, True, False], [False, False, False]])[None, None]
    padding = torch.tensor([[1.0, 2.0, 3.0], [4.0, -INF, 6.0]])
    bias = bias_of(attn_mask, padding)
    assert bias[:, 0].tolist() == [[[1.0, -INF, 3.0], [1.0, 2.0, 3.0]], [[4.0, -INF, 6.0], [4.0, -INF, 6.0]]]
    assert bias.shape == (2, 1, 2, 3)


def test_attention_bias_sums_two_float_masks():
    attn_mask = torch.tensor([[[[0.5, 1.0, 1.5]]]], dtype=torch.float64)
    bias = bias_of(attn_mask, torch.tensor([[1.0, 1.0, -INF]], dtype=torch.bfloat16))
    assert bias.dtype == torch.float32
    assert bias.tolist() == [[[[1.5, 2.0, -INF]]]]


def test_attention_bias_unites_two_bool_masks_and_causality():
    attn_mask = torch.tensor([[True, False, False], [False, False, False]])[None, None]
    bias = bias_of(attn_mask, torch.tensor([[False, True, False]]), is_causal=True)
    assert bias.tolist() == [[[[-INF, -INF, -INF], [0.0, -INF, -INF]]]]


def test_attention_bias_of_causality_alone_is_4d():
    assert bias_of(is_causal=True).tolist() == [[[[0.0, -INF, -INF], [0.0, 0.0, -INF]]]]


def test_virtual_keys_are_visible_columns_after_the_real_ones():
    bias = bias_of(torch.ones(1, 1, 2, 3, dtype=torch.bool), is_causal=True, window=(0, 0), virtual_keys=2)
    assert bias.tolist() == [[[[-INF, -INF, -INF, 0.0, 0.0]] * 2]]


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 1, 1, 3), (1, 4, 2, 3), (2, 4, 2, 3)], ids=str)
def test_attention_bias_keeps_the_dimensions_that_broadcast(shape):
    assert bias_of(torch.zeros(shape, dtype=torch.bool)).shape == shape


def test_given_masks_are_not_changed():
    attn_mask, padding = torch.zeros(1, 1, 2, 3), torch.tensor([[True, False, False]])
    bias_of(attn_mask, padding, is_causal=True)
    assert torch.equal(attn_mask, torch.zeros(1, 1, 2, 3))
    assert padding.tolist() == [[True, False, False]]

"""`fused_mha.testing.strategies`: what is drawn serves torch's module, and what is fixed stays so."""

import copy

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import nn

import fused_mha
from fused_mha.testing import Case, assert_parity, strategies

from search import examples

MODULES = {
    "torch's defaults": {},
    "batch first, dropout": {"batch_first": True, "dropout": 0.3},
    "other sizes": {"kdim": 6, "vdim": 5},
    "other sizes, of one tensor": {"kdim": 6, "vdim": 6, "batch_first": True},
    "virtual keys": {"add_bias_kv": True, "add_zero_attn": True},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@settings(max_examples=examples(20))
@given(data=st.data())
def test_calls_of_a_module_are_served_and_compared(options, data):
    theirs = nn.MultiheadAttention(16, 4, **options)
    ours = copy.deepcopy(theirs)
    fused_mha.convert(ours)
    inputs, keywords = data.draw(strategies.calls(theirs))
    assert_parity(ours, theirs, *inputs, **keywords)


@settings(max_examples=examples(40))
@given(data=st.data())
def test_masks_have_the_sizes_that_are_given(data):
    masks = data.draw(strategies.masks(2, 3, 5, 4, dtype=torch.float64))
    assert list(masks) == ["attn_mask", "key_padding_mask"]
    attn_mask, padding = masks.values()
    assert attn_mask is None or (
        attn_mask.shape in ((3, 5), (8, 3, 5)) and attn_mask.dtype in (torch.bool, torch.float64)
    )
    assert padding is None or (padding.shape == (2, 5) and padding.dtype in (torch.bool, torch.float64))


@settings(max_examples=examples(40))
@given(data=st.data())
def test_inputs_have_the_sizes_and_dtypes_that_are_given(data):
    drawn = data.draw(strategies.inputs(16, kdim=6, vdim=5, batch_first=True, dtypes=(torch.float16, torch.float64)))
    query, key, value = drawn
    assert [x.shape[-1] for x in drawn] == [16, 6, 5]
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.float16, torch.float64)
    assert key.shape[:-1] == value.shape[:-1]
    assert query.dim() == 2 or query.shape[0] == key.shape[0]


KINDS = {
    "self-attention": lambda case: case.sharing == "self",
    "another size of keys": lambda case: case.kdim != case.vdim,
    "unbatched": lambda case: not case.batched,
    "empty": lambda case: case.N == 0,
    "mask per head": lambda case: case.attn_mask == "float per head",
    "float padding": lambda case: case.key_padding_mask == "float",
    "hint": lambda case: case.is_causal,
    "virtual keys": lambda case: case.add_bias_kv and case.add_zero_attn,
    "dropout in training": lambda case: case.training and case.dropout > 0.0,
    "strides": lambda case: case.strides == "expanded",
    "many keys": lambda case: case.S > 16,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_is_drawn(kind):
    assert kind(find(strategies.cases(), kind))


@given(case=strategies.cases(embed_dim=24, num_heads=3, kdim=7, training=False, dtype=torch.float64, N=2))
def test_fixed_fields_are_not_drawn(case):
    assert (case.embed_dim, case.num_heads, case.kdim, case.vdim) == (24, 3, 7, None)
    assert (case.training, case.dtype, case.N, case.sharing) == (False, torch.float64, 2, "separate")


@pytest.mark.parametrize(
    "field", [{"embed_dim": 10}, {"num_heads": 5}, {"is_causal": True}, {"attn_mask": "causal bool"}], ids=str
)
@settings(max_examples=examples(20))
@given(data=st.data())
def test_a_field_alone_may_be_fixed(field, data):
    case = data.draw(strategies.cases(**field))
    ours, theirs, inputs, arguments = case.build()
    assert_parity(ours, theirs, *inputs, **arguments)
    assert case._asdict().items() >= field.items()


def test_an_unknown_field_is_named():
    with pytest.raises(TypeError, match=r"takes the fields of Case, group, N, .*dtype; got heads"):
        find(strategies.cases(heads=3), lambda _: True)


def test_values_come_from_the_seed_alone():
    case = Case(sharing="separate", attn_mask="float", key_padding_mask="bool")
    runs = [(case.inputs(generator), case.masks(generator)) for generator in map(torch.manual_seed, (0, 0, 1))]
    same = [torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0][0], other[0], strict=True)]
    assert same == [True] * 3 + [False] * 3
    assert [torch.equal(runs[0][1]["attn_mask"], masks["attn_mask"]) for _, masks in runs[1:]] == [True, False]

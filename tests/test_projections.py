"""`fused_mha.module.projections`: the linear maps around the attention core."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_mha import convert
from fused_mha.module import projections
from fused_mha.testing import assert_parity
from fused_mha.testing.tolerances import tolerance

E = 6
SHARINGS = ["self", "key is value", "separate"]
NAN = float("nan")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(result, expected):
    assert result.shape == expected.shape
    bound = tolerance(torch.float64, 0.0, expected.abs().max().item(), terms=E)
    assert (result - expected).abs().max().item() <= bound


def inputs_of(sharing):
    query = draw(2, 3, E)
    if sharing == "self":
        return query, query, query
    key = draw(2, 4, E, seed=1)
    return query, key, key if sharing == "key is value" else draw(2, 4, E, seed=2)


def project_visible(inputs, hidden, weight, bias):
    return projections.packed_in_projection(*projections.without_hidden_keys(*inputs, hidden), weight, bias)


@pytest.mark.parametrize("bias", [draw(3 * E, seed=4), None], ids=["bias", "no bias"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_packed_rows_are_query_key_value(sharing, bias):
    weight = draw(3 * E, E, seed=3)
    inputs = inputs_of(sharing)
    results = projections.packed_in_projection(*inputs, weight, bias)
    for i, (x, result) in enumerate(zip(inputs, results, strict=True)):
        rows = slice(i * E, (i + 1) * E)
        assert_close(result, F.linear(x, weight[rows], None if bias is None else bias[rows]))


@pytest.mark.parametrize("bias", [draw(3 * E, seed=4), None], ids=["bias", "no bias"])
def test_separate_weights_have_sizes_of_their_own(bias):
    inputs = (draw(2, 3, E), draw(2, 4, 5, seed=1), draw(2, 4, 8, seed=2))
    weights = (draw(E, E, seed=5), draw(E, 5, seed=6), draw(E, 8, seed=7))
    results = projections.separate_in_projection(*inputs, *weights, bias)
    for i, (x, weight, result) in enumerate(zip(inputs, weights, results, strict=True)):
        assert_close(result, F.linear(x, weight, None if bias is None else bias[i * E : (i + 1) * E]))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_hidden_keys_that_are_nan_give_finite_keys_and_values(sharing):
    inputs = inputs_of(sharing)
    hidden = torch.zeros(*inputs[1].shape[:2], 1, dtype=torch.bool)
    hidden[0, 1:] = True
    weight, bias = draw(3 * E, E, seed=3), draw(3 * E, seed=4)
    clean = project_visible(inputs, hidden, weight, bias)
    for x in dict.fromkeys(inputs[1:]):
        x[0, 1:] = NAN
    query, key, value = projections.packed_in_projection(
        *projections.without_hidden_keys(*inputs, hidden), weight, bias
    )
    for x, expected in ((key, clean[1]), (value, clean[2])):
        assert torch.equal(x[~hidden[..., 0]], expected[~hidden[..., 0]])
    assert all(bool(x.isfinite().all()) for x in (query, key, value))  # also where the hidden row is a query


@pytest.mark.parametrize("sharing", SHARINGS)
def test_hidden_keys_reach_no_gradient_of_the_weight(sharing):
    inputs = inputs_of(sharing)
    hidden = torch.zeros(*inputs[1].shape[:2], 1, dtype=torch.bool)
    hidden[0, 1:] = True
    weight = draw(3 * E, E, seed=3).requires_grad_()
    for x in dict.fromkeys(inputs[1:]):
        x[0, 1:] = NAN
    sum(x.sum() for x in project_visible(inputs, hidden, weight, None)).backward()
    assert bool(weight.grad.isfinite().all())
    assert bool((weight.grad != 0).all())


@pytest.mark.parametrize(
    ("shape", "batch_first", "expected"),
    [((2, 3, E), True, (2, 3, 2, 3)), ((3, 2, E), False, (2, 3, 2, 3)), ((3, E), True, (1, 3, 2, 3))],
    ids=str,
)
def test_split_heads_views_consecutive_features_as_one_head(shape, batch_first, expected):
    x = draw(*shape)
    heads = projections.split_heads(x, 3, batch_first)
    assert heads.shape == expected
    assert heads.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    sequence_first = x if len(shape) == 2 else x[:, 0] if not batch_first else x[0]
    assert torch.equal(heads[0, :, 1], sequence_first[:, 3:6])


@pytest.mark.parametrize("shape", [(2, 3, E), (1, 1, E), (0, 3, E), (3, E)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_merge_heads_undoes_split_heads_contiguously(shape, batch_first):
    x = draw(*shape)
    merged = projections.merge_heads(projections.split_heads(x, 3, batch_first), len(shape) == 3, batch_first)
    assert torch.equal(merged, x)
    assert merged.is_contiguous()


def test_merge_heads_is_contiguous_for_any_strides():
    heads = draw(2, 3, 2, 4).transpose(1, 2)  # [N, L, H, D]
    assert projections.merge_heads(heads, True, True).is_contiguous()
    assert projections.merge_heads(heads, True, False).is_contiguous()


def test_split_heads_takes_a_shard_of_the_heads():
    assert projections.split_heads(draw(2, 5, 2 * 4), 4, True).shape == (2, 5, 2, 4)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [(torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_a_bias_of_another_dtype_is_added_as_torch_does(sharing, dtype, bias_dtype):
    theirs = nn.MultiheadAttention(E, 2, batch_first=True, dtype=dtype)
    theirs.in_proj_bias = nn.Parameter(torch.randn(3 * E, dtype=bias_dtype))
    ours = copy.deepcopy(theirs)
    convert(ours)
    drawn, cast = inputs_of(sharing), {}
    inputs = [cast.setdefault(id(x), x.to(dtype)) for x in drawn]
    assert_parity(ours, theirs, *inputs)
    ours.batch_first = False  # which torch refuses
    transposed, _ = ours(*(x.transpose(0, 1) for x in inputs))
    ours.batch_first = True
    torch.testing.assert_close(transposed.transpose(0, 1), ours(*inputs)[0])

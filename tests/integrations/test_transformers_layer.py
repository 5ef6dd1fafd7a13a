"""The attention function that models of transformers call: each keyword means what it means in `eager`."""

import pytest
import torch

from closeness import assert_close_to_oracle
from fused_mha.integrations import transformers as integration


def heads(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Layer(torch.nn.Module):
    """All that the attention function asks of a layer."""


def attend(query, key, value, mask=None, **keywords):
    layer = Layer().train(keywords.pop("training", False))
    return integration.attention_forward(layer, query, key, value, mask, **keywords)


def eager(query, key, value, mask=None, scaling=None, softcap=None, s_aux=None, position_bias=None, head_mask=None):
    """What eager functions of transformers compute, all in one."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        scores = scores + mask[..., : key.shape[2]]
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    weights = weights if head_mask is None else weights * head_mask.view(1, -1, 1, 1)
    return (weights @ value).transpose(1, 2), weights


QUERY, KEY, VALUE = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)
BIAS, SINKS, FACTORS = heads((1, 4, 5, 7), (4,), (4,), seed=1)
SEEN = torch.ones(2, 1, 5, 9, dtype=torch.bool).tril(2)
OPTIONS = {
    "grouped heads and a value size of its own": {},
    "a scale": {"scaling": 0.7},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": SINKS},
    "a bias": {"position_bias": BIAS},
    "a factor for each head": {"head_mask": FACTORS.view(1, 4, 1, 1)},
    "a bool mask, longer than the keys": {"mask": SEEN},
    "a bool mask of one row and rank 3": {"mask": SEEN[0, :, 2:3, :7]},
    "a float mask": {"mask": torch.where(SEEN[:1], 0.3, -torch.inf)},
    "a bool mask and a bias": {"mask": SEEN, "position_bias": BIAS},
    "a float mask and a bias": {"mask": torch.where(SEEN, 0.3, -3e38), "position_bias": BIAS},
    "everything": {
        "mask": SEEN,
        "scaling": 0.7,
        "softcap": 1.5,
        "s_aux": SINKS,
        "position_bias": BIAS,
        "head_mask": FACTORS,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layers_keywords_mean_what_they_mean_in_eager(options):
    query, key, value = (x.requires_grad_() for x in heads(QUERY, KEY, VALUE))

    def with_gradients(function, inputs, **more):
        output, weights = function(*inputs, **options, **more)
        gradients = torch.autograd.grad(output.cos().sum() + weights.sin().sum(), inputs)
        names = ("output", "weights", "query", "key", "value")
        return dict(zip(names, (output.detach(), weights.detach(), *gradients), strict=True))

    doubled = [x.detach().double().requires_grad_() for x in (query, key, value)]
    assert_close_to_oracle(
        with_gradients(attend, (query, key, value), output_attentions=True),
        with_gradients(eager, (query, key, value)),
        lambda: with_gradients(eager, doubled),
        terms=8 * 7 * 5,
    )


def test_a_position_bias_gets_its_gradient():
    query, key, value = heads(QUERY, KEY, VALUE)
    bias = BIAS.clone().requires_grad_()
    (ours,) = torch.autograd.grad(attend(query, key, value, SEEN, position_bias=bias)[0].cos().sum(), bias)
    (theirs,) = torch.autograd.grad(eager(query, key, value, SEEN, position_bias=bias)[0].cos().sum(), bias)
    torch.testing.assert_close(ours, theirs)


def test_a_layer_without_a_mask_is_causal_where_it_says_so():
    query, key, value = heads((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for keywords, mask in (
        ({}, None),
        ({"is_causal": False}, None),
        ({"is_causal": True}, causal),
        ({"is_causal": True, "sliding_window": 2}, causal.triu(-1)),
    ):
        ours, _ = attend(query, key, value, **keywords)
        torch.testing.assert_close(ours, eager(query, key, value, mask)[0])


class _Result:
    output = weights = None


def test_keys_and_values_are_read_where_they_lie(monkeypatch):
    given = []
    monkeypatch.setattr(integration, "attention", lambda *tensors, **_: given.extend(tensors) or _Result())
    query, key, value = heads(QUERY, KEY, VALUE)
    attend(query, key, value)
    assert [x.data_ptr() for x in given] == [query.data_ptr(), key.data_ptr(), value.data_ptr()]
    assert given[1].shape == (2, 7, 2, 8)


def test_dropout_is_for_training():
    query, key, value = heads(QUERY, KEY, VALUE)
    whole, _ = attend(query, key, value)
    evaluated, _ = attend(query, key, value, dropout=0.4)
    assert torch.equal(evaluated, whole)
    output, weights = attend(query, key, value, dropout=0.4, training=True, output_attentions=True)
    share = (weights == 0).double().mean().item()
    assert abs(share - 0.4) < 0.1
    torch.testing.assert_close(output, (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"indices": torch.zeros(1)}, "indices is a keyword of attention that fused_mha does not know; got Tensor"),
        ({"sinks": torch.zeros(1)}, "sinks is a keyword of attention"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 5])}, "cu_seq_lens_q gives 2 sequences, and the mask does not"),
        ({"sliding_window": 2}, "sliding_window=2 has no meaning without a mask for 5 queries and 7 keys"),
        ({"head_mask": torch.zeros(2, 4)}, r"head_mask must have one number for each of 4 heads; got shape \(2, 4\)"),
    ],
)
def test_what_the_core_cannot_compute_is_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        attend(*heads(QUERY, KEY, VALUE), **keywords)


@pytest.mark.parametrize("name", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_scores_that_a_layer_scales_in_silence_are_refused(name):
    layer = Layer()
    setattr(layer, name, name != "scale_attn_weights")
    with pytest.raises(ValueError, match=name):
        integration.attention_forward(layer, *heads(QUERY, KEY, VALUE), None)
    integration.attention_forward(layer, *heads(QUERY, KEY, VALUE), None, scaling=1.0)


def test_a_mask_of_one_row_for_a_causal_layer_is_refused():
    layer, mask = Layer(), torch.zeros(2, 1, 1, 7)
    layer.is_causal = True
    query, key, value = heads(QUERY, KEY, VALUE)
    message = r"attention_mask must have a row for each of the 5 queries of a causal layer; got shape \(2, 1, 1, 7\)"
    with pytest.raises(ValueError, match=message):
        integration.attention_forward(layer, query, key, value, mask)
    integration.attention_forward(layer, query[:, :, :1], key, value, mask)
    layer.is_cross_attention = True
    integration.attention_forward(layer, query, key, value, mask)


def test_keywords_of_others_are_let_pass():
    others = {"position_ids": torch.zeros(1), "use_cache": True, "indices": None, "deterministic": False}
    sequences = {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 7]), "max_length_q": 5}
    query, key, value = heads(QUERY, KEY, VALUE)
    expected, _ = attend(query, key, value, SEEN)
    assert torch.equal(attend(query, key, value, SEEN, **others, **sequences)[0], expected)
    apart = torch.tensor([0, 2, 5])
    assert torch.equal(attend(query, key, value, SEEN, cu_seq_lens_q=apart)[0], expected)

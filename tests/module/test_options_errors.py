"""Mistakes in the options of a module and in the calls that they allow: the argument, what came, what was expected."""

import pytest
import torch

import fused_mha
from fused_mha import MultiHeadAttention, RotaryEmbedding

E, H, N, L = 12, 4, 2, 5

OF_THE_CONSTRUCTOR = [
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 4; got 3"),
    ({"num_kv_heads": 8}, ValueError, "num_kv_heads must divide num_heads = 4; got 8"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be an int of at least 1, or None; got 0"),
    ({"head_dim": 2.0}, ValueError, "head_dim must be an int of at least 1, or None; got 2.0"),
    ({"value_head_dim": -1}, ValueError, "value_head_dim must be an int of at least 1, or None; got -1"),
    ({"window": (1,)}, ValueError, r"window must be \(left, right\), each None or a count of keys >= 0; got \(1,\)"),
    ({"window": (-1, 0)}, ValueError, r"window must be .*; got \(-1, 0\)"),
    ({"window": 3}, ValueError, "window must be .*; got 3"),
    ({"softcap": 0.0}, ValueError, "softcap must be .*; got 0.0"),
    ({"softcap": -2.0}, ValueError, "softcap must be .*; got -2.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be .*; got inf"),
    ({"sinks": 1}, TypeError, "sinks must be True or False; got 1"),
    ({"gate": "yes"}, TypeError, "gate must be True or False; got 'yes'"),
    ({"rope": True}, TypeError, "rope must be a fused_mha.RotaryEmbedding or None; got bool"),
    ({"rope": RotaryEmbedding(4)}, ValueError, "rope must rotate at most head_dim = 3 components; got dim = 4"),
    ({"qk_norm": "batch"}, ValueError, r"qk_norm must be one of \('rms', 'layer', 'l2'\) or None; got 'batch'"),
    ({"alibi": [0.5, 0.25]}, ValueError, r"alibi must be True, False or 4 finite slopes.*; got shape \(2,\)"),
    ({"alibi": None}, TypeError, "alibi must be True, False or 4 finite slopes, one for each head; got None"),
    ({"alibi": "all"}, TypeError, "alibi must be .* 4 finite slopes.*; got 'all'"),
    ({"alibi": [[0.5], 0.25, 1.0, 1.0]}, TypeError, r"alibi must be .* 4 finite slopes.*; got \[\[0.5\], 0.25"),
    ({"alibi": [0.5, 0.25, float("nan"), 1.0]}, ValueError, "alibi must be .* 4 finite slopes.*; got .*nan"),
]


@pytest.mark.parametrize(("options", "error", "text"), OF_THE_CONSTRUCTOR, ids=[str(x[0]) for x in OF_THE_CONSTRUCTOR])
def test_a_mistake_in_an_option_is_named(options, error, text):
    with pytest.raises(error, match=text):
        MultiHeadAttention(E, H, **options)


def test_heads_divide_embed_dim_unless_their_size_is_given():
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiHeadAttention(10, 4, num_kv_heads=2)
    assert MultiHeadAttention(10, 4, head_dim=3).out_proj.in_features == 12


X = torch.randn(N, L, E)
OF_A_CALL = [
    ({"positions": torch.arange(L + 1)}, ValueError, r"positions must have shape \(L\) = \(5,\) or .*; got \(6,\)"),
    ({"positions": torch.zeros(3, L).long()}, ValueError, r"\(N, L\) = \(2, 5\); got \(3, 5\)"),
    ({"positions": torch.zeros(L)}, TypeError, "positions must be a tensor of an integer dtype; got torch.float32"),
    ({"positions": torch.zeros(L).bool()}, TypeError, "positions must be .*; got torch.bool"),
    ({"positions": [0, 1, 2, 3, 4]}, TypeError, "positions must be .*; got list"),
    ({"positions": torch.zeros(L, device="meta").long()}, RuntimeError, "positions must be on the heads' device, cpu"),
    ({"key": X[:, :1], "value": X[:, :1]}, ValueError, r"self-attention: key must have query's shape, .*; got"),
    ({"attn_mask": torch.zeros(4, 4)}, RuntimeError, r"attn_mask must have shape \(L, S\) = \(5, 5\)"),
]


@pytest.mark.parametrize(("call", "error", "text"), OF_A_CALL, ids=[text for _, _, text in OF_A_CALL])
def test_a_mistake_in_a_call_is_named(call, error, text):
    module = MultiHeadAttention(E, H, head_dim=4, rope=RotaryEmbedding(4), batch_first=True)
    with pytest.raises(error, match=text):
        module(**{"query": X, "key": X, "value": X} | call)


def test_unbatched_positions_have_one_dimension():
    module, x = MultiHeadAttention(E, H, head_dim=4, rope=RotaryEmbedding(4)), X[0]
    with pytest.raises(ValueError, match=r"positions must have shape \(L\) = \(5,\); got \(1, 5\)"):
        module(x, x, x, positions=torch.arange(L).view(1, L))


@pytest.mark.parametrize("options", [{}, {"window": (1, 0)}], ids=["no options", "a window"])
def test_positions_are_for_rope(options):
    with pytest.raises(ValueError, match="positions are for rope=RotaryEmbedding"):
        MultiHeadAttention(E, H, batch_first=True, **options)(X, X, X, positions=torch.arange(L))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_positions_of_nested_tensors_are_counted():
    module = MultiHeadAttention(E, H, head_dim=4, rope=fused_mha.RotaryEmbedding(4), batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad(), pytest.raises(ValueError, match="positions must be None with nested tensors"):
        module(nested, nested, nested, positions=torch.arange(5))

"""The module itself: attributes, copies, initialisation, loading, and results that can be computed by hand."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention
from fused_mha.module.multi_head_attention import keep_forward_called
from fused_mha.testing.strategies import DTYPES

CONFIGURATIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"dropout": 0.25, "add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 8, "dtype": torch.float64},
]


def _save_and_load(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _save_and_load,
}


def _identity(embed_dim: int, num_heads: int = 1, **arguments) -> MultiHeadAttention:
    """A module whose projections change nothing, so that its results can be computed by hand."""
    module = MultiHeadAttention(embed_dim, num_heads, **arguments)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(embed_dim).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(embed_dim))
    return module


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_attributes_are_those_of_torch(arguments):
    ours, theirs = MultiHeadAttention(8, 2, **arguments), nn.MultiheadAttention(8, 2, **arguments)
    for name in (
        "embed_dim",
        "kdim",
        "vdim",
        "num_heads",
        "head_dim",
        "dropout",
        "batch_first",
        "add_zero_attn",
        "training",
        "_qkv_same_embed_dim",
        "__constants__",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k"):
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None), name


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_instance_state_is_that_of_torch_and_one_hook(arguments):
    ours, theirs = MultiHeadAttention(8, 2, **arguments), nn.MultiheadAttention(8, 2, **arguments)
    assert set(vars(ours)) == set(vars(theirs))
    assert list(ours._forward_pre_hooks.values()) == [keep_forward_called]
    for name, value in vars(theirs).items():
        if name.endswith("_hooks") and name != "_forward_pre_hooks":
            assert vars(ours)[name] == value, name
    for x in (torch.randn(4, 8), torch.randn(4, 3, 8)):
        key, value = (torch.randn(*x.shape[:-1], size) for size in (ours.kdim, ours.vdim))
        ours(x.to(ours.out_proj.weight.dtype), key.to(ours.out_proj.weight.dtype), value.to(ours.out_proj.weight.dtype))
    assert set(vars(ours)) == set(vars(theirs))  # a call leaves nothing behind


def test_module_is_a_subclass_of_torch_with_a_forward_of_its_own():
    module = MultiHeadAttention(8, 2)
    assert isinstance(module, nn.MultiheadAttention)
    for name in ("__init__", "forward", "reset_parameters", "_reset_parameters"):
        assert name in vars(MultiHeadAttention), name


def test_repr_is_that_of_torch_by_our_name():
    theirs = repr(nn.MultiheadAttention(8, 2))
    assert repr(MultiHeadAttention(8, 2)) == theirs.replace("MultiheadAttention(", "MultiHeadAttention(")


def test_dropout_may_be_changed_between_calls():
    module = _identity(2)
    x = torch.randn(3, 2)
    before, _ = module(x, x, x)
    module.dropout = 1.0
    assert torch.equal(module(x, x, x)[0], torch.zeros(3, 2))
    module.dropout = 0.0
    assert torch.equal(module(x, x, x)[0], before)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_a_copy_computes_the_same_and_shares_nothing(duplicate, arguments):
    module = MultiHeadAttention(8, 2, **arguments).eval()
    twin = duplicate(module)
    assert type(twin) is MultiHeadAttention
    assert not twin.training
    assert list(twin._forward_pre_hooks.values()) == [keep_forward_called]
    dtype = module.out_proj.weight.dtype
    inputs = [torch.randn(4, 3, size, dtype=dtype) for size in (8, module.kdim, module.vdim)]
    expected = module(*inputs)
    assert torch.equal(twin(*inputs)[0], expected[0])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(module(*inputs)[0], expected[0])


def test_pickle_of_an_old_torch_module_gets_what_it_lacks():
    module = MultiHeadAttention(8, 2)
    state = dict(module.__dict__)
    del state["_qkv_same_embed_dim"]
    state["_forward_pre_hooks"] = type(module._forward_pre_hooks)()
    old = MultiHeadAttention.__new__(MultiHeadAttention)
    old.__setstate__(state)
    assert old._qkv_same_embed_dim is True
    assert list(old._forward_pre_hooks.values()) == [keep_forward_called]
    x = torch.randn(4, 3, 8)
    assert torch.equal(old(x, x, x)[0], module(x, x, x)[0])


def test_merge_masks_is_that_of_torch():
    ours, theirs = MultiHeadAttention(8, 2), nn.MultiheadAttention(8, 2)
    query = torch.randn(3, 4, 8)
    attn_mask, padding = torch.rand(4, 4) < 0.5, torch.rand(3, 4) < 0.5
    per_head = torch.rand(6, 4, 4) < 0.5
    for masks in ((None, None), (attn_mask, None), (None, padding), (attn_mask, padding), (per_head, padding)):
        (merged, kind), (expected, expected_kind) = ours.merge_masks(*masks, query), theirs.merge_masks(*masks, query)
        assert kind == expected_kind
        assert merged is expected or torch.equal(merged, expected)


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_reset_parameters_draws_what_the_constructor_draws(arguments):
    torch.manual_seed(3)
    expected = MultiHeadAttention(8, 2, **arguments).state_dict()
    torch.manual_seed(4)
    module = MultiHeadAttention(8, 2, **arguments)
    torch.manual_seed(3)
    module.reset_parameters()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
def test_module_made_on_the_meta_device_is_initialised_by_reset_parameters(arguments):
    torch.manual_seed(3)
    expected = nn.MultiheadAttention(8, 2, **arguments).state_dict()
    module = MultiHeadAttention(8, 2, **arguments, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(3)
    module.reset_parameters()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"embed_dim": 12}, r"in_proj_weight.*\(\[36, 12\]\).*\(\[24, 8\]\)"),
        ({"embed_dim": 12}, r"out_proj.bias.*\(\[12\]\).*\(\[8\]\)"),
        ({"bias": False}, r'Missing.*"in_proj_bias", "out_proj.bias"'),
        ({"add_bias_kv": True}, r'Unexpected.*"bias_k", "bias_v"'),
        (
            {"kdim": 6},
            r'(?s)Missing.*"in_proj_weight".*Unexpected.*"q_proj_weight", "k_proj_weight", "v_proj_weight"',
        ),
    ],
    ids=str,
)
def test_state_dict_of_another_configuration_changes_nothing(arguments, text):
    module = MultiHeadAttention(8, 2)
    before = copy.deepcopy(module.state_dict())
    other = MultiHeadAttention(**({"embed_dim": 8, "num_heads": 2} | arguments))
    with pytest.raises(RuntimeError):
        nn.MultiheadAttention(8, 2).load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=text):
        module.load_state_dict(other.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_state_dict_that_does_not_fit_is_not_assigned_either():
    module = MultiHeadAttention(8, 2)
    parameters = dict(module.named_parameters())
    with pytest.raises(RuntimeError):
        module.load_state_dict(MultiHeadAttention(8, 2, kdim=6).state_dict(), assign=True)
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_load_state_dict_lets_the_hooks_of_a_submodule_rename_keys():
    old, new = MultiHeadAttention(8, 2), MultiHeadAttention(8, 2)
    nn.utils.weight_norm(old.out_proj)  # weight_g, weight_v
    nn.utils.parametrizations.weight_norm(new.out_proj)
    new.load_state_dict(old.state_dict())
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(new(x, x, x)[0], old(x, x, x)[0])


def test_num_heads_that_is_changed_later_counts_as_in_torch():
    ours, theirs = MultiHeadAttention(8, 2), nn.MultiheadAttention(8, 2)
    theirs.load_state_dict(ours.state_dict())
    ours.num_heads = theirs.num_heads = 4
    theirs.head_dim = 2
    x = torch.randn(3, 2, 8)
    for mine, yours in zip(
        ours(x, x, x, average_attn_weights=False), theirs(x, x, x, average_attn_weights=False), strict=True
    ):
        torch.testing.assert_close(mine, yours)


def test_bias_k_without_bias_v_is_an_error_as_in_torch():
    x = torch.randn(3, 2, 8)
    for module in (MultiHeadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, add_bias_kv=True)):
        module.bias_v = None
        with pytest.raises(AssertionError, match="bias_k"):
            module(x, x, x)


def test_load_state_dict_takes_what_torch_takes():
    module, other = MultiHeadAttention(8, 2), nn.MultiheadAttention(8, 2)
    partial = {"in_proj_weight": other.in_proj_weight.detach(), "unknown": torch.zeros(1)}
    result = module.load_state_dict(partial, strict=False)
    assert result.unexpected_keys == ["unknown"]
    assert result.missing_keys == ["in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert torch.equal(module.in_proj_weight, other.in_proj_weight)
    module.load_state_dict(other.state_dict(), assign=True)
    assert module.in_proj_weight.data_ptr() == other.in_proj_weight.data_ptr()


def test_weights_of_two_keys_are_the_softmax_of_their_scores():
    module = _identity(1, bias=False)
    query = torch.tensor([[1.0]])
    key = torch.tensor([[0.0], [math.log(3.0)]])  # scores 0 and log 3: weights 1/4 and 3/4
    value = torch.tensor([[4.0], [8.0]])
    output, weights = module(query, key, value)
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(output, torch.tensor([[7.0]]))  # 4/4 + 3*8/4


def test_scores_are_divided_by_the_root_of_the_head_size():
    module = _identity(4, bias=False)
    query = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    key = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(9.0), math.log(9.0), 0.0, 0.0]])  # 2 log 9 / sqrt(4) = log 9
    _, weights = module(query, key, key)
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.9]]))


def test_each_head_attends_by_its_own_slice_of_the_features():
    module = _identity(2, num_heads=2, bias=False)
    query = torch.tensor([[1.0, 1.0]])
    key = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])
    value = torch.tensor([[0.0, 0.0], [4.0, 8.0]])
    output, weights = module(query, key, value, average_attn_weights=False)
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.75]], [[0.75, 0.25]]]))  # [H, L, S]
    torch.testing.assert_close(output, torch.tensor([[3.0, 2.0]]))
    torch.testing.assert_close(module(query, key, value)[1], torch.tensor([[0.5, 0.5]]))


def test_equal_scores_average_the_visible_values():
    module = _identity(1, bias=False)
    query, key = torch.ones(3, 1), torch.zeros(4, 1)
    value = torch.tensor([[1.0], [2.0], [6.0], [100.0]])
    padding = torch.tensor([False, False, False, True])
    torch.testing.assert_close(
        module(query, key, value, key_padding_mask=padding)[0], torch.tensor([[3.0], [3.0], [3.0]])
    )
    output, weights = module(query, key, value, is_causal=True)
    torch.testing.assert_close(output, torch.tensor([[1.0], [1.5], [3.0]]))
    torch.testing.assert_close(
        weights, torch.tensor([[1.0, 0.0, 0.0, 0.0], [1 / 2, 1 / 2, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]])
    )
    only_second = torch.full((3, 4), float("-inf"))
    only_second[:, 1] = 5.0
    torch.testing.assert_close(module(query, key, value, attn_mask=only_second)[0], torch.full((3, 1), 2.0))


def test_virtual_keys_follow_the_real_ones():
    module = _identity(1, bias=False, add_bias_kv=True, add_zero_attn=True)
    with torch.no_grad():
        module.bias_k.fill_(math.log(2.0))
        module.bias_v.fill_(8.0)
    output, weights = module(torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 4.0))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.5, 0.25]]))  # the real key, bias_k, zero
    torch.testing.assert_close(output, torch.tensor([[5.0]]))  # 4/4 + 8/2 + 0/4


def test_biases_are_added_by_both_projections():
    module = _identity(1)
    with torch.no_grad():
        module.in_proj_bias.copy_(torch.tensor([1.0, 0.0, 3.0]))  # of query, key, value
        module.out_proj.bias.fill_(10.0)
    key = torch.tensor([[0.0], [math.log(3.0)]])
    output, weights = module(torch.zeros(1, 1), key, torch.tensor([[1.0], [5.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(output, torch.tensor([[17.0]]))  # (1 + 3)/4 + 3(5 + 3)/4 + 10


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_have_the_dtype_of_the_parameters(dtype, need_weights):
    module = MultiHeadAttention(8, 2, dtype=dtype)
    x = torch.randn(4, 3, 8, dtype=dtype)
    output, weights = module(x, x, x, need_weights=need_weights)
    assert output.dtype == dtype
    assert weights.dtype == dtype if need_weights else weights is None


def test_module_follows_a_change_of_dtype():
    module = MultiHeadAttention(8, 2).double()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    assert module(x, x, x)[0].dtype == torch.float64


def test_weights_are_rows_that_sum_to_one():
    module = MultiHeadAttention(8, 2, add_bias_kv=True, dtype=torch.float64)
    _, weights = module(*(torch.randn(n, 3, 8, dtype=torch.float64) for n in (4, 6, 6)), average_attn_weights=False)
    assert weights.shape == (3, 2, 4, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 4, dtype=torch.float64))


def test_attention_on_the_meta_device_gives_shapes():
    module = MultiHeadAttention(8, 2, device="meta")
    x = torch.randn(4, 3, 8, device="meta")
    for back_end in ("sdpa", "reference"):
        with fused_mha.backend(back_end):
            output, _ = module(x, x, x, need_weights=False)
        assert output.is_meta
        assert output.shape == (4, 3, 8)

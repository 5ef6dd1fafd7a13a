"""Outputs, weights, every gradient, state_dict and initial values equal those of `torch.nn.MultiheadAttention`."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import fused_mha
from fused_mha.testing import Case, assert_parity, grid
from fused_mha.testing.strategies import DTYPES, cases, fast_path_cases, seeds

CONSTRUCTOR_ARGUMENTS = [
    {},
    {"bias": False},
    {"dropout": 0.3},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 6},
    {"vdim": 5},
    {"kdim": 6, "vdim": 5, "add_bias_kv": True, "bias": False},
    {"kdim": 8, "vdim": 8},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16, "add_bias_kv": True},
    {"dtype": torch.float16, "kdim": 6},
]


def _assert_parity(case: Case, seed: int = 0) -> None:
    ours, theirs, inputs, arguments = case.build(seed=seed)
    assert_parity(ours, theirs, *inputs, seed=seed, **arguments)


@given(case=cases(), seed=seeds)
@example(case=Case(embed_dim=4, num_heads=4, kdim=1, vdim=1, sharing="cross", attn_mask="float"), seed=0)
@example(case=Case(N=0, attn_mask="float", key_padding_mask="bool"), seed=0)
@example(case=Case(S=0, sharing="cross", add_zero_attn=True, dropout=0.5), seed=0)
@example(case=Case(batched=False, attn_mask="causal float", is_causal=True, need_weights=False), seed=0)
def test_any_call_agrees_with_torch(case, seed):
    _assert_parity(case, seed)


@given(case=cases(), seed=seeds)
def test_any_call_agrees_with_torch_on_the_reference_back_end(case, seed):
    with fused_mha.backend("reference"):
        _assert_parity(case, seed)


@given(case=cases(allow_empty=False), seed=seeds)
def test_any_call_without_weights_agrees_with_torch_on_the_op_of_torch(case, seed):
    with fused_mha.backend("sdpa"):
        _assert_parity(case._replace(need_weights=False, dropout=0.0), seed)


@given(case=cases(), seed=seeds)
def test_any_call_without_gradients_agrees_with_torch(case, seed):
    with torch.no_grad():
        _assert_parity(case._replace(training=False), seed)


@pytest.mark.thorough(one_in=5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_grid_agrees_with_torch(case, dtype):
    _assert_parity(case._replace(dtype=dtype))


@given(case=fast_path_cases(), seed=seeds)
def test_eval_without_gradients_agrees_with_the_fast_path_of_torch(case, seed):
    with torch.no_grad():
        _assert_parity(case, seed)


@pytest.mark.parametrize("attn_mask", [None, "bool", "bool per head"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_fast_path_cases_reach_the_fast_path_of_torch(monkeypatch, attn_mask, need_weights):
    calls = []
    native = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(1) or native(*args))
    case = Case(attn_mask=attn_mask, key_padding_mask="bool", need_weights=need_weights, training=False)
    ours, theirs, inputs, arguments = case.build()
    with torch.no_grad():
        theirs(*inputs, **arguments)
        assert len(calls) == 1
        ours(*inputs, **arguments)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(data=st.data(), seed=seeds)
def test_autocast_agrees_with_torch_in_results_and_dtypes(data, dtype, seed):
    case = data.draw(cases(dtypes=(torch.float32, dtype)))
    with torch.autocast("cpu", dtype):
        _assert_parity(case, seed)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sharing", ["self", "cross", "separate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtypes_of_torch(dtype, sharing, need_weights):
    add_bias_kv = dtype != torch.float16  # torch can't concatenate fp16 and bf16 under autocast
    case = Case(sharing=sharing, need_weights=need_weights, dtype=dtype, add_bias_kv=add_bias_kv)
    ours, theirs, inputs, arguments = case.build()
    dtypes = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            output, weights = module(*leaves, **arguments)
        output.float().sum().backward()
        gradients = [x.grad.dtype for x in leaves] + [p.grad.dtype for p in module.parameters()]
        dtypes.append([output.dtype, weights if weights is None else weights.dtype, *gradients])
    assert dtypes[0] == dtypes[1]


def test_autocast_takes_inputs_of_another_dtype_than_the_parameters():
    ours, theirs, (query, key, value), arguments = Case(sharing="separate").build()
    with torch.autocast("cpu", torch.bfloat16):
        assert_parity(ours, theirs, query.bfloat16(), key, value.bfloat16(), **arguments)


@pytest.mark.parametrize("arguments", CONSTRUCTOR_ARGUMENTS, ids=str)
def test_initial_values_are_bit_equal_under_one_seed(arguments):
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(8, 2, **arguments)
    state_of_torch = torch.get_rng_state()
    torch.manual_seed(7)
    ours = fused_mha.MultiHeadAttention(8, 2, **arguments)
    assert torch.equal(torch.get_rng_state(), state_of_torch)  # what is built next draws the same values too
    expected = theirs.state_dict()
    state = ours.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("arguments", CONSTRUCTOR_ARGUMENTS, ids=str)
def test_state_dicts_and_parameters_have_the_names_and_order_of_torch(arguments):
    ours = fused_mha.MultiHeadAttention(8, 2, **arguments)
    theirs = nn.MultiheadAttention(8, 2, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours._parameters) == list(theirs._parameters)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [type(module) for module in ours.children()] == [type(module) for module in theirs.children()]
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_positional_arguments_stand_in_the_order_of_torch():
    ours, theirs, inputs, arguments = Case(sharing="separate", attn_mask="bool", key_padding_mask="bool").build()
    positional = (*inputs, arguments["key_padding_mask"], True, arguments["attn_mask"], False, False)
    torch.testing.assert_close(ours(*positional), theirs(*positional))
    assert ours(*positional)[1].shape == (2, 4, 5, 7)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradient_of_a_float_mask_agrees_with_torch(need_weights):
    case = Case(sharing="separate", attn_mask="float per head", key_padding_mask="float", need_weights=need_weights)
    ours, theirs, inputs, arguments = case.build()
    for name in ("attn_mask", "key_padding_mask"):
        arguments[name] = arguments[name].clamp(min=-3.0).requires_grad_()
    compared = {comparison.quantity for comparison in assert_parity(ours, theirs, *inputs, **arguments)}
    assert {"grad of attn_mask", "grad of key_padding_mask"} <= compared

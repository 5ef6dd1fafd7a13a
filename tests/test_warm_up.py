"""`warm_up`: which calls it makes, what it says, and its errors; test_without_gpu.py counts what is compiled."""

import sys

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha.backends import triton
from fused_mha.core import plans

warm_up_module = sys.modules["fused_mha.warm_up"]  # of which the function has the name
PADDING = {"key_padding_mask": torch.bool}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of `attention`, on an installation whose CPU is the GPU."""
    found = []

    def attention(*inputs, **given):
        found.append((inputs, given))
        return fused_mha.attention(*inputs, **given)

    monkeypatch.setattr(warm_up_module, "attention", attention)
    monkeypatch.setattr(warm_up_module, "_reason_against", lambda: None)
    monkeypatch.setattr(plans, "DEVICE", "cpu")
    plans.forget()
    yield found
    plans.forget()


def sizes(inputs):
    return [tuple(x.shape) for x in inputs]


def test_calls_of_head_sizes(calls, capsys):
    given = [PADDING, {"attn_mask": torch.float32, "need_weights": True, "bias_kv": True, "grouped": True}]
    assert fused_mha.warm_up([4, (8, 6)], calls=given, lengths=[5], dtype=torch.bfloat16, device="cpu") == 4
    assert [sizes(inputs) for inputs, _ in calls] == [
        [(1, 5, 8, 4), (1, 5, 8, 4), (1, 5, 8, 4)],
        [(1, 5, 16, 4), (1, 5, 8, 4), (1, 5, 8, 4)],
        [(1, 5, 8, 8), (1, 5, 8, 8), (1, 5, 8, 6)],
        [(1, 5, 16, 8), (1, 5, 8, 8), (1, 5, 8, 6)],
    ]
    assert all(x.dtype == torch.bfloat16 and not x.requires_grad for inputs, _ in calls for x in inputs)
    _, masked = calls[1]
    assert masked["attn_mask"].shape == (5, 5)
    assert masked["attn_mask"].dtype == torch.float32
    assert masked["need_weights"] is True
    assert masked["bias_v"].shape == (8, 4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("fused_mha.warm_up: 1 of 4: heads of 4, bfloat16, length 5, key_padding_mask=bool: ")
    assert "heads of 8 and 6" in lines[3]


def test_sinks_and_slopes_are_given_for_each_query_head(calls):
    given = [{"sinks": torch.bfloat16, "alibi_slopes": torch.float32, "softcap": 2.0, "grouped": True}]
    assert fused_mha.warm_up([4], calls=given, dtype=torch.float32, device="cpu", backward=True) == 1
    _, found = calls[0]
    assert {name: (x.shape, x.dtype) for name, x in found.items() if name != "softcap"} == {
        "sinks": ((16,), torch.bfloat16),
        "alibi_slopes": ((16,), torch.float32),
    }
    assert found["softcap"] == 2.0


def test_packed_sequences_are_as_many_as_the_batch_has(calls, monkeypatch):
    packed = []

    def varlen_attention(*inputs, **given):
        packed.append((inputs, given))
        return fused_mha.varlen_attention(*inputs, **given)

    monkeypatch.setattr(warm_up_module, "varlen_attention", varlen_attention)
    given = [PADDING | {"packed": True, "is_causal": True, "grouped": True}]
    settings = {"lengths": [5], "batch_size": 3, "dtype": torch.float32, "device": "cpu", "backward": True}
    assert fused_mha.warm_up([4], calls=given, **settings) == 1
    assert not calls
    (inputs, found), *others = packed
    assert not others
    assert sizes(inputs) == [(15, 16, 4), (15, 8, 4), (15, 8, 4), (4,), (4,)]
    assert inputs[3].tolist() == [0, 5, 10, 15]
    assert found["key_padding_mask"].shape == (15,)
    assert found["is_causal"]


def test_a_module_with_options_says_what_its_calls_are(calls):
    module = fused_mha.MultiHeadAttention(
        *(16, 4), num_kv_heads=2, head_dim=6, value_head_dim=5, window=(3, 0), softcap=2.0, sinks=True, alibi=True
    )
    assert fused_mha.warm_up(module, calls=[{}], lengths=[7], backward=True) == 1
    inputs, given = calls[0]
    assert sizes(inputs) == [(1, 7, 4, 6), (1, 7, 2, 6), (1, 7, 2, 5)]
    assert (given["window"], given["softcap"]) == ((3, 0), 2.0)
    assert given["sinks"].shape == given["alibi_slopes"].shape == (4,)


def test_a_model_says_what_its_calls_are(calls):
    layers = [fused_mha.MultiHeadAttention(16, 4, dropout=0.1, add_bias_kv=True, add_zero_attn=True) for _ in range(2)]
    model = nn.Sequential(*layers, fused_mha.MultiHeadAttention(16, 2))
    assert fused_mha.warm_up(model, calls=[PADDING], lengths=[3, 4], batch_size=2) == 4  # of two kinds of modules
    inputs, given = calls[0]
    assert sizes(inputs) == [(2, 3, 4, 4)] * 3
    assert all(x.requires_grad for x in inputs)
    assert given["dropout_p"] == 0.1
    assert given["add_zero_attn"] is True
    assert given["bias_k"].shape == (4, 4)
    calls.clear()
    fused_mha.warm_up(model.eval(), calls=[PADDING])
    inputs, given = calls[0]
    assert "dropout_p" not in given
    assert not inputs[0].requires_grad


def test_modules_without_a_packed_weight_or_with_another_out_projection(calls):
    replaced = fused_mha.MultiHeadAttention(16, 4, dtype=torch.bfloat16)
    replaced.out_proj = nn.Sequential(nn.Linear(16, 16))
    assert fused_mha.warm_up(replaced, calls=[PADDING], lengths=[3]) == 1
    assert fused_mha.warm_up(fused_mha.MultiHeadAttention(16, 4, kdim=8, dtype=torch.float16), calls=[PADDING]) == 1
    assert [inputs[0].dtype for inputs, _ in calls] == [torch.bfloat16, torch.float16]


def test_generators_stay_as_they_are(calls):
    before = torch.get_rng_state()
    fused_mha.warm_up([16], calls=[{"dropout_p": 0.5}], lengths=[8], dtype=torch.float32, device="cpu")
    assert calls
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_are_compiled_in_inference_mode_too(calls):
    with torch.inference_mode():
        assert fused_mha.warm_up(fused_mha.MultiHeadAttention(16, 4), calls=[PADDING], lengths=[3]) == 1
        assert torch.is_inference_mode_enabled()
    (inputs, _), *_ = calls
    assert all(x.requires_grad for x in inputs)


def test_calls_are_cast_under_autocast(calls, monkeypatch):
    outputs, attention = [], warm_up_module.attention
    monkeypatch.setattr(warm_up_module, "attention", lambda *x, **y: outputs.append(attention(*x, **y)) or outputs[-1])
    with torch.autocast("cpu", torch.bfloat16):
        fused_mha.warm_up([16], calls=[PADDING], lengths=[3], dtype=torch.float32, device="cpu")
    assert calls
    assert outputs[0].output.dtype == torch.bfloat16


def test_without_a_core_for_cuda_it_says_so_and_does_nothing(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    without = triton.BACKEND._replace(capability=triton.BACKEND.capability._replace(is_installed=False))
    installed = triton.BACKEND._replace(capability=triton.BACKEND.capability._replace(is_installed=True))
    for back_end, reason in ((without, "Triton is not installed"), (installed, "there is no GPU")):
        monkeypatch.setattr(triton, "BACKEND", back_end)
        assert fused_mha.warm_up(fused_mha.MultiHeadAttention(8, 2)) == 0
        assert capsys.readouterr().err == f"fused_mha.warm_up: nothing to compile: {reason}\n"


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    ("target", "options", "text"),
    [
        (nn.Linear(2, 2), {}, "target must hold a fused_mha.MultiHeadAttention; Linear has none"),
        (fused_mha.MultiHeadAttention(8, 2, device="meta"), {}, "target must be on a GPU; got meta"),
        ([64], {}, "dtype must be given with head sizes; got None"),
        ([64], {"dtype": torch.half}, "target must be on a GPU; got cuda"),
        (
            [64],
            {"calls": [{"padding": torch.bool}]},
            "calls must name attn_mask, key_padding_mask, sinks, alibi_slopes, is_causal, dropout_p, softcap, "
            "need_weights, average_attn_weights, weights_of_heads, return_lse, add_zero_attn, bias_kv, grouped, "
            "packed; got 'padding'",
        ),
        (
            fused_mha.MultiHeadAttention(8, 2, add_zero_attn=True),
            {"calls": [{"packed": True, "need_weights": True}]},
            "calls must not give packed beside need_weights, add_zero_attn",
        ),
        (
            [64],
            {"calls": [{"attn_mask": True}]},
            "calls must give attn_mask by its dtype, such as torch.bool; got True",
        ),
    ],
)
def test_errors_name_the_argument(target, options, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fused_mha.warm_up(target, **options)
    assert str(caught.value) == text

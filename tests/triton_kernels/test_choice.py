"""Which calls the CUDA core takes, leaves to torch's kernels or refuses; no GPU is needed to say so."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_mha
from attention_oracle import checked, make_arguments
from fused_mha.backends import sdpa, triton
from fused_mha.backends.capability import Capability, not_supported_reasons
from fused_mha.core import dispatch
from fused_mha.core.varlen import of_sequences
from fused_mha.ops import fallback
from fused_mha.ops.module import Call
from native.test_operators import operands

pytest.importorskip("triton")


MANY = {"N": 1, "H": 2, "H_kv": 2, "L": 11600, "S": 11600}  # more than 2^28 scores


def explain(learns=False, packed=False, **options):
    """The choice for a call on a GPU, with a mask that learns or not, of packed sequences or not."""
    arguments = make_arguments(**{"D": 64, "D_v": 64, "dtype": torch.float16} | options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x
            for name, x in arguments.items()
        }
        if learns:
            arguments["attn_mask"].requires_grad_()
        inputs = checked(**arguments)
        if packed:
            offsets = torch.empty(3, dtype=torch.int64, device="cuda")
            inputs = of_sequences(inputs, offsets, offsets)
        return dispatch.explain_inputs(inputs)


@pytest.mark.parametrize("plain", [{}, {"is_causal": True, "S": 3}, {"dtype": torch.float32}], ids=", ".join)
def test_plain_calls_are_left_to_torch_and_explain_says_why(plain):
    explanation = explain(**plain)
    assert explanation.chosen == "sdpa"
    assert (
        "  triton: could serve, but leaves it: nothing but causality hides a key, and torch's own kernels are near the "
        "limit there ("
    ) in str(explanation)


@pytest.mark.parametrize(
    "call",
    [
        {"need_weights": True},
        {"return_lse": True},
        {"mask_dtype": torch.bool, "mask_shape": "NHLS"},
        {"padding_dtype": torch.float32},
        {"window": (3, 3)},
        {"is_causal": True, "bias_kv": True},
        {"add_zero_attn": True},
        {"dropout_p": 0.1},
        {"L": 1},
        {"N": 32768},
        {"scale": 0.0, "is_causal": True},
        {"scale": -0.1},
    ],
    ids=", ".join,
)
def test_what_torch_does_not_fuse_is_ours(call):
    explanation = explain(**call)
    assert (explanation.chosen, explanation.left) == ("triton", {})


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        ({"padding_dtype": torch.bool}, "sdpa"),
        ({"mask_dtype": torch.float32, "mask_shape": "NHLS", "is_causal": True}, "sdpa"),
        ({"dropout_p": 0.1}, "sdpa"),
        ({"bias_kv": True}, "sdpa"),
        ({"need_weights": True}, "reference"),
        (MANY | {"dropout_p": 0.1}, "sdpa"),
        (MANY | {"need_weights": True}, "triton"),
        (MANY | {"H_kv": 1}, "triton"),
        (MANY | {"padding_dtype": torch.bool}, "sdpa"),  # of which a mask has half as many numbers
        (MANY | {"mask_dtype": torch.bool, "mask_shape": "HS"}, "triton"),
        ({"H_kv": 1, "padding_dtype": torch.bool}, "sdpa"),
        ({"return_lse": True}, "triton"),
        ({"window": (3, 3)}, "triton"),
        ({"L": 1, "padding_dtype": torch.bool}, "triton"),
    ],
    ids=str,
)
def test_float32_is_left_to_torch_where_it_is_exact(call, chosen):
    explanation = explain(dtype=torch.float32, **call)
    assert explanation.chosen == chosen
    reason = "torch's products of float32 are faster on a GPU than Triton's ("
    assert [why.startswith(reason) for why in explanation.left.values()] == ([] if chosen == "triton" else [True])


def module_call(**changed):
    """What the back end sdpa is asked of a module's call on a GPU: a plain one, but for the changes."""
    with FakeTensorMode():
        x, in_weight, out_weight = (torch.empty(shape, device="cuda") for shape in ((2, 5, 32), (96, 32), (32, 32)))
        in_bias, out_bias, padding = (torch.empty(size, device="cuda") for size in (96, 32, (2, 5)))
        given = {
            "key": None,
            "key_padding_mask": None,
            "out_bias": out_bias,
            "batch_first": True,
            "need_weights": False,
        }
        given |= {name: {"x": x, "padding": padding}.get(value, value) for name, value in changed.items()}
        call = Call(
            query=torch.empty((2, 1, 32), device="cuda") if given.pop("one", False) else x,
            value=None,
            in_weight=in_weight.requires_grad_(given.pop("learns", False)),
            **dict.fromkeys(("query_weight", "key_weight", "value_weight", "bias_k", "bias_v", "attn_mask", "seed")),
            **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k")),
            in_bias=in_bias,
            out_weight=out_weight,
            num_heads=given.pop("num_heads", 4),
            is_causal=given.pop("is_causal", False),
            dropout_p=given.pop("dropout_p", 0.0),
            add_zero_attn=False,
            scale=1.0,
            average_attn_weights=True,
            **given,
        )
        return sdpa.BACKEND.serves_module(call)


@pytest.mark.parametrize(
    "changed",
    [
        {"key": "x"},
        {"key_padding_mask": "padding"},
        {"out_bias": None},
        {"batch_first": False},
        {"need_weights": True},
        {"one": True},
        {"learns": True},
        {"num_heads": 8},
        {"is_causal": True},
        {"dropout_p": 0.1},
    ],
    ids=", ".join,
)
def test_torchs_operator_of_a_module_serves_plain_inference_alone(changed):
    assert module_call() is not None
    assert module_call(**changed) is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": torch.float64}, "it knows no torch.float64"),
        ({"D": 257}, "its largest head size is 256 (it is 257)"),
        ({"L": 0}, "an input is empty (query (2, 0, 4, 64), key (2, 4, 2, 64))"),
    ],
    ids=["dtype", "head size", "empty"],
)
def test_what_it_cannot_do_is_said(call, reason):
    explanation = explain(need_weights=True, **call)
    assert (explanation.chosen, explanation.reasons["triton"]) == ("reference", [reason])


def test_chips_that_are_too_old_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    inputs = checked(**make_arguments())
    assert not_supported_reasons(Capability(cuda_capability=(8, 0)), inputs) == [
        "it needs a GPU of compute capability 8.0 (it is 7.5)"
    ]
    assert not_supported_reasons(Capability(cuda_capability=(7, 5)), inputs) == []


def test_cannot_be_forced_on_the_cpu():
    with fused_mha.backend("triton"), pytest.raises(RuntimeError, match="it runs on cuda alone"):
        fused_mha.attention(**make_arguments())


@pytest.mark.parametrize("case", [{"dtype": torch.float64}, {"D": 300}, {"S": 0}], ids=["fp64", "head size", "no key"])
def test_an_exported_graph_runs_also_with_what_the_kernels_cannot_do(case):
    arguments = operands(requires_grad=False, **case)
    for found, expected in zip(triton._attention(*arguments), fallback.attention(*arguments), strict=True):
        assert torch.equal(found, expected)

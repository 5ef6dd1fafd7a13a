"""Which calls the CUDA core takes, leaves to torch's kernels or refuses; no GPU is needed to say so."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_mha
from attention_oracle import DEFAULTS, make_arguments
from fused_mha import dispatch
from fused_mha.backends import triton
from fused_mha.backends.capability import Capability, not_supported_reasons
from fused_mha.inputs import check_attention
from fused_mha.ops import fallback
from native.test_operators import operands

pytest.importorskip("triton")


def explain(**options):
    """The choice for a call on a GPU."""
    arguments = make_arguments(**{"D": 64, "D_v": 64, "dtype": torch.float16} | options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x
            for name, x in arguments.items()
        }
        return dispatch.explain_inputs(check_attention(**DEFAULTS | arguments))


@pytest.mark.parametrize("plain", [{}, {"is_causal": True, "S": 3}, {"dtype": torch.float32}], ids=", ".join)
def test_plain_calls_are_left_to_torch_and_explain_says_why(plain):
    explanation = explain(**plain)
    assert explanation.chosen == "sdpa"
    assert (
        "  triton: could serve, but leaves it: nothing but causality hides a key, and torch's own kernels are near the "
        "limit there\n"
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
    ],
    ids=", ".join,
)
def test_what_torch_does_not_fuse_is_ours(call):
    explanation = explain(**call)
    assert (explanation.chosen, explanation.left) == ("triton", {})


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
    inputs = check_attention(**DEFAULTS | make_arguments())
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

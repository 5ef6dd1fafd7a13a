"""What a back end can serve, and every reason why it cannot, as `capability` gives them."""

import pytest
import torch

import fused_mha
from attention_oracle import checked, explain_attention, make_arguments
from fused_mha.backends import capability
from fused_mha.backends.capability import Capability, not_supported_reasons

REASONS_AGAINST_SDPA = {
    "it returns no attention weights (need_weights=True)": {"need_weights": True},
    "it returns no log-sum-exp (return_lse=True)": {"return_lse": True},
    "it has no fused dropout on the CPU (dropout_p=0.25)": {"dropout_p": 0.25},
    "an input is empty (query (0, 3, 4, 3), key (0, 4, 2, 3))": {"N": 0},
    "an input is empty (query (2, 0, 4, 3), key (2, 4, 2, 3))": {"L": 0},
    "an input is empty (query (2, 3, 4, 3), key (2, 0, 2, 3))": {"S": 0},
}
REASONS_AGAINST_CPU = {
    "it runs on cpu alone (query is on meta)": {"query": "meta", "key": "meta", "value": "meta"},
    "it knows no torch.float8_e5m2": {"attn_mask": torch.float8_e5m2},
    "it knows no torch.float8_e4m3fn and no torch.float8_e5m2": {
        "attn_mask": torch.float8_e5m2,
        "key_padding_mask": torch.float8_e4m3fn,
    },
}


def reasons_on_the_cpu(explanation):
    """Without those of `triton`, which are tested once."""
    reasons = dict(explanation.reasons)
    assert reasons.pop("triton")[0].startswith("it runs on cuda alone (query is on ")
    return reasons


@pytest.mark.parametrize(("reason", "arguments"), REASONS_AGAINST_SDPA.items(), ids=REASONS_AGAINST_SDPA)
def test_reason_against_sdpa(reason, arguments, without_the_library):
    explanation = explain_attention(**make_arguments(**arguments))
    assert reasons_on_the_cpu(explanation) == {
        "cpu": ["it is not in this installation"],
        "sdpa": [reason],
        "reference": [],
    }
    assert explanation.chosen == "reference"


@pytest.mark.parametrize("arguments", REASONS_AGAINST_SDPA.values(), ids=REASONS_AGAINST_SDPA)
def test_cpu_serves_what_sdpa_cannot(arguments):
    explanation = explain_attention(**make_arguments(**arguments))
    assert (explanation.chosen, explanation.reasons["cpu"]) == ("cpu", [])


@pytest.mark.parametrize(("reason", "changes"), REASONS_AGAINST_CPU.items(), ids=REASONS_AGAINST_CPU)
def test_reason_against_cpu(reason, changes):
    arguments = make_arguments(mask_dtype=torch.float32, padding_dtype=torch.float32)
    if "query" in changes:  # masks on another device are a reason against sdpa too
        arguments = {name: arguments[name] for name in changes}
    arguments |= {name: arguments[name].to(change) for name, change in changes.items()}
    explanation = explain_attention(**arguments)
    assert reasons_on_the_cpu(explanation) == {"cpu": [reason], "sdpa": [], "reference": []}
    assert explanation.chosen == "sdpa"


def test_a_mask_that_cpu_does_not_know_is_served_by_the_next(served_by):
    arguments = make_arguments(mask_dtype=torch.float16, hidden=0.0)
    arguments["attn_mask"] = arguments["attn_mask"].to(torch.float8_e5m2)
    output = fused_mha.attention(**arguments).output
    same = arguments | {"attn_mask": arguments["attn_mask"].float()}
    torch.testing.assert_close(output, fused_mha.attention(**same).output)
    assert served_by == ["sdpa", "cpu"]


def test_every_reason_is_given_not_only_the_first():
    arguments = make_arguments(need_weights=True, return_lse=True, dropout_p=0.5, S=0)
    assert len(explain_attention(**arguments).reasons["sdpa"]) == 4
    arguments = make_arguments(mask_dtype=torch.float32)
    arguments = {name: x.to("meta", torch.float8_e5m2) for name, x in arguments.items()}
    assert explain_attention(**arguments).reasons["cpu"] == [
        "it runs on cpu alone (query is on meta)",
        "it knows no torch.float8_e5m2",
    ]


def test_that_it_is_not_installed_is_the_only_reason():
    arguments = make_arguments(need_weights=True, return_lse=True)
    missing = Capability(is_installed=False, weights=False, lse=False)
    assert not_supported_reasons(missing, checked(**arguments)) == ["it is not in this installation"]


def test_onnx_export_goes_to_operators_of_torch(monkeypatch, module, x, served_by):
    monkeypatch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
    assert torch.onnx.is_in_onnx_export()
    torch.export.export(module, (x, x, x), {"need_weights": False})  # what `torch.onnx.export` begins with
    torch.export.export(module, (x, x, x))
    assert served_by == ["sdpa", "reference"]
    monkeypatch.setattr(capability, "onnx_export_is_active", lambda: True)
    in_half = make_arguments(mask_dtype=torch.bool, dtype=torch.float16)
    assert reasons_on_the_cpu(explain_attention(**in_half))["sdpa"] == [
        "its kernels for ONNX are not known to be right with a mask in torch.float16"
    ]
    assert reasons_on_the_cpu(explain_attention(**make_arguments(mask_dtype=torch.bool)))["sdpa"] == []
    with monkeypatch.context() as patch:
        patch.setattr("torch.jit.is_tracing", lambda: True)
        assert reasons_on_the_cpu(explain_attention(**make_arguments()))["sdpa"] == [
            "torch.onnx.export(dynamo=False) translates it without grouped heads, and for new opsets alone"
        ]
    reason = "the model is exported to ONNX, which has no operator for it"
    reasons = reasons_on_the_cpu(fused_mha.explain(module, x, need_weights=False))
    assert reasons == {"cpu": [reason], "sdpa": [], "reference": []}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual level"])
def test_transforms_go_to_the_reference(transform, module, x, served_by):
    def function(x):
        return module(x, x, x, need_weights=False)[0].sum()

    if transform == "vmap":
        torch.func.vmap(function)(x[None])
    elif transform == "grad":
        torch.func.grad(function)(x)
    elif transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    else:
        with torch.autograd.forward_ad.dual_level():
            function(x)
            reasons = reasons_on_the_cpu(fused_mha.explain(module, x, need_weights=False))
            reason = "a torch.func transform or forward-mode AD is active"
            assert reasons == {"cpu": [reason], "sdpa": [reason], "reference": []}
    assert served_by == ["reference"]

"""The table of who serves a call on CUDA: each of its rules, and that its figures are those of the recorded run."""

import json
from pathlib import Path

import pytest
import torch

import fused_mha
from fused_mha.backends.delegation import MODULE_RULE, RECORDED, RULES
from fused_mha.module import one_call
from triton_kernels.test_choice import MANY, explain

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
HIDES = {"padding_dtype": torch.bool}
SINGLE, WEIGHTS = {"dtype": torch.float32}, {"need_weights": True}


def masked(dtype):
    return {"mask_dtype": dtype, "mask_shape": "NHLS"}


# A call that no rule before this one holds for, and who serves it.
CALLS = {
    "packed sequences": (SINGLE | {"packed": True}, "triton"),
    "score options": (SINGLE | {"softcap": 1.0}, "triton"),
    "log-sum-exp": ({"return_lse": True}, "triton"),
    "single query": ({"L": 1}, "triton"),
    "many heads": ({"N": 32768}, "triton"),
    "scale": ({"scale": -1.0}, "triton"),
    "everything dropped": (SINGLE | {"dropout_p": 1.0}, "triton"),
    "grouped heads, other values": ({"H": 4, "H_kv": 2, "D_v": 32}, "triton"),
    "fp32, many scores": (SINGLE | WEIGHTS | MANY, "triton"),
    "no mask": ({}, "sdpa"),
    "window": (SINGLE | {"window": (1, 1)}, "triton"),
    "fp32, a mask that learns": (SINGLE | masked(torch.float32) | {"learns": True}, "triton"),
    "fp32, weights": (SINGLE | WEIGHTS, "reference"),
    "fp32": (SINGLE | HIDES | {"dropout_p": 0.1}, "sdpa"),
    "dropout": ({"dropout_p": 0.1} | WEIGHTS | HIDES, "triton"),
    "weights": (WEIGHTS | masked(torch.float16), "triton"),
    "float attn_mask": (masked(torch.float16) | HIDES, "triton"),
    "bool attn_mask": (masked(torch.bool) | HIDES, "triton"),
    "padding": (HIDES, "triton"),
    "other masks": ({"add_zero_attn": True}, "triton"),
}
MEASURED = [rule for rule in (*RULES, MODULE_RULE) if rule.measured is not None]


def test_there_is_a_call_for_each_rule():
    assert list(CALLS) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CALLS)
def test_each_rule_decides_and_is_printed_with_its_measurement(name):
    (call, chosen), (rule,) = CALLS[name], (rule for rule in RULES if rule.name == name)
    explanation = explain(**call)
    assert (explanation.chosen, rule.serves) == (chosen, chosen)
    line = f"  note: {rule}" if chosen == "triton" else f"  triton: could serve, but leaves it: {rule}"
    assert line in str(explanation).splitlines()
    assert rule.reason in line
    assert str(rule.measured or "not timed") in line


def test_a_rule_that_did_not_decide_is_not_printed():
    with fused_mha.backend("triton"):
        explanation = explain()
    assert (explanation.chosen, explanation.notes) == ("triton", [])


@pytest.mark.parametrize("rule", MEASURED, ids=lambda rule: rule.name)
def test_figures_are_those_of_the_recorded_cells(rule):
    measured = rule.measured
    if measured.where != RECORDED:
        assert not measured.groups
        return
    rows = json.loads((ROOT / measured.where).read_text())["rows"]
    rows = [row for row in rows if row["group"] in measured.groups]
    assert {row["group"] for row in rows} == set(measured.groups)
    kinds = measured.kinds or {row["name"].partition(", ")[2] for row in rows}
    found = [row["ratio"] for row in rows if row["name"].partition(", ")[2] in kinds]
    assert (round(min(found), 2), round(max(found), 2)) == (measured.lowest, measured.highest)


@pytest.mark.parametrize("rule", MEASURED, ids=lambda rule: rule.name)
def test_a_call_is_left_to_torch_only_where_torch_was_faster_in_every_cell(rule):
    assert rule.serves == "triton" or rule.measured.highest < 1.0


def test_explain_prints_the_rule_of_plain_inference_of_a_module(monkeypatch):
    module = fused_mha.MultiHeadAttention(16, 4, batch_first=True)
    monkeypatch.setattr(one_call, "kept", lambda *_, **__: "a call on a GPU")
    monkeypatch.setattr(one_call, "keep", lambda *_: "what serves it")
    with fused_mha.backend("sdpa"):
        explanation = fused_mha.explain(module, torch.randn(2, 5, 16), need_weights=False)
    assert explanation.projections == f"in one step with the attention, by {MODULE_RULE}"

"""The GPU script's steps and its last table, by files and processes that stand for those of a GPU."""

import argparse
import json
import sys

import pytest
import torch

import cuda_beside
import cuda_summary
import fused_mha
import run_cuda
from run_cuda import Step

XML = """<testsuites><testsuite tests="{tests}" failures="2" errors="1" skipped="3"></testsuite></testsuites>"""
LOG = """2 workers [9 items]
tests/cuda/test_module.py::test_a[self-1]
[gw0] [ 50%] PASSED tests/cuda/test_module.py::test_a[self-1]
[gw1] [ 50%] PASSED tests/cuda/test_module.py::test_b
[gw0] [ 99%] FAILED tests/cuda/test_module.py::test_c
tests/cuda/test_module.py::test_d SKIPPED (there is one GPU)                                     [100%]
FAILED is no outcome here
"""


def row(group, name, ratio, **milliseconds):
    timings = {contender: {"median": median} for contender, median in milliseconds.items()}
    return {"group": group, "name": name, "ratio": ratio, "timings": timings}


RESULTS = {
    "device": "A GPU",
    "torch": "2.11.0",
    "commit": "abc",
    "rows": [
        row("padding", "small", 2.0, ours=1.0, cudnn_attention=2.0, flex_attention=0.8),
        row("padding", "large", 0.5, ours=4.0, cudnn_attention=2.0),
        row("float mask", "small", 0.75, ours=4.0, sdpa_cleaned=5.0),
    ],
    "wrong": ["padding, huge"],
}


def test_the_table_has_each_group_with_its_lowest_ratio_and_its_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_summary.processor, "cpu_name", lambda: "A processor")
    (tmp_path / "cuda.json").write_text(json.dumps(RESULTS))
    (tmp_path / "cuda_tests.xml").write_text(XML.format(tests=16))
    (tmp_path / "cuda_tests.log").write_text("collected 20 items\n")
    (tmp_path / "host_time.json").write_text(json.dumps({"attention": {"ours": [10.0, 12.0], "SDPA": [13.04, 20.0]}}))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "parity.xml").write_text('<testsuite tests="7" failures="0"/>')
    (tmp_path / "cpu" / "module_8_threads.json").write_text(json.dumps(RESULTS | {"rows": RESULTS["rows"][:1]}))
    lines = cuda_summary.summary(tmp_path).splitlines()
    assert lines[:3] == [
        "processor: A processor; measured on: A GPU, torch 2.11.0, commit abc",
        "tests/cuda: 10 passed, 2 failed, 1 errors, 3 skipped, 4 not reached",
        "cpu, parity: 7 passed, 0 failed, 0 errors, 0 skipped, 0 not reached",
    ]
    cells = [line.split("  ") for line in lines]
    rows = [[entry.strip() for entry in line if entry.strip()] for line in cells]
    assert ["theirs / ours", "cells", "mean", "lowest", "cuDNN", "FlexAttention", "SDPA cleaned"] in rows
    assert ["padding", "2", "1.00", "0.50", "1.00 (2)", "0.80 (1)", "-"] in rows
    assert ["float mask", "1", "0.75", "0.75", "-", "-", "1.25 (1)"] in rows
    assert "WRONG padding, huge" in lines
    assert lines.index("cpu, module_8_threads:") < len(lines) - 4
    assert "  attention: ours 10.0, SDPA 13.0" in lines


def test_tests_that_were_stopped_are_counted_by_their_log(tmp_path):
    xml, log = tmp_path / "cuda_tests.xml", tmp_path / "cuda_tests.log"
    assert cuda_summary.tests(xml, log) == "not run"
    log.write_text(LOG)
    expected = "2 passed, 1 failed, 0 errors, 1 skipped, 5 not reached"
    assert cuda_summary.tests(xml, log) == expected
    xml.write_text(XML.format(tests=9)[:40])
    assert cuda_summary.tests(xml, log) == expected


def test_what_no_step_has_left_is_named(tmp_path):
    (tmp_path / "host_time.json").write_text('{"attention": {')
    lines = cuda_summary.summary(tmp_path).splitlines()
    assert "tests/cuda: not run" in lines
    assert "no benchmark: cuda.json is missing" in lines
    assert "no host time: host_time.json is missing" in lines


def test_a_step_is_stopped_when_its_time_is_over_and_what_it_wrote_is_kept(tmp_path, capsys):
    code = "import time\ntry: print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('ended')"
    command = [sys.executable, "-I", "-S", "-c", code]  # which has begun at once, on a busy machine too
    assert run_cuda._run(Step("slow", command, 2.0), tmp_path) == 1
    assert (tmp_path / "slow.log").read_text().split() == ["begun", "ended"]
    assert "stopped after 2 s" in capsys.readouterr().out


def test_a_step_may_fail_or_be_no_program(tmp_path, capsys):
    code = "import os, sys; print(os.environ['OF_STEP']); sys.exit(3)"
    step = Step("fails", [sys.executable, "-c", code], 60.0, {"OF_STEP": "its own"})
    assert run_cuda._run(step, tmp_path) == 3
    assert (tmp_path / "fails.log").read_text() == "its own\n"
    assert run_cuda._run(Step("absent", [str(tmp_path / "no_program")], 60.0), tmp_path) == 1
    assert "no_program" in capsys.readouterr().out


def test_no_step_stops_the_next_and_the_table_comes_last(tmp_path, monkeypatch, capsys):
    begun = []

    def run(step, out):
        begun.append(step.name)
        return 1

    monkeypatch.setattr(run_cuda, "_run", run)
    monkeypatch.setattr(run_cuda, "HAS_GPU", False)
    monkeypatch.setattr(run_cuda.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["run_cuda.py", "--out", str(tmp_path), "--cpu"])
    assert run_cuda.main() == 1
    of_cpu = ["info", "parity", "native_tests"]
    of_cpu += [f"{name}_{threads}_threads" for threads in (1, 8) for name in ("attention", "module")]
    assert begun == ["cuda_tests", "cuda_benchmark", *of_cpu]
    assert capsys.readouterr().out.strip() == (tmp_path / "summary.txt").read_text().strip()
    begun.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "only"])
    run_cuda.main()
    assert begun == of_cpu


def test_steps_of_the_processor_do_not_see_the_gpu(tmp_path):
    options = argparse.Namespace(workers=1, cpu_seconds=5.0)
    for step in run_cuda._cpu_steps(options, tmp_path):
        assert (step.environment["CUDA_VISIBLE_DEVICES"], step.seconds) == ("", 5.0)


PADDING = torch.tensor([[False, False, True], [False, True, True]])


@pytest.fixture(autouse=True)
def _without_effect_on_other_tests(monkeypatch):
    monkeypatch.setattr(cuda_beside, "_compiled", [])


def inputs():
    return [torch.randn(2, 3, 2, 4) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [False, True])
def test_flex_attention_has_the_masks_of_the_case(is_causal, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    given = inputs()
    attention = cuda_beside.flex_attention("case", PADDING, is_causal, 3, given)
    expected = fused_mha.attention(*given, key_padding_mask=PADDING, is_causal=is_causal).output
    torch.testing.assert_close(attention(*given), expected)


def test_flex_attention_that_fails_or_takes_too_long_is_skipped(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    assert cuda_beside.flex_attention("a case", PADDING, False, 3, inputs()) is None
    monkeypatch.setattr(cuda_beside, "_compiled", [50.0])
    assert cuda_beside.flex_attention("a case", PADDING, False, 3, inputs()) is None
    assert capsys.readouterr().out.splitlines() == [
        "skipped: FlexAttention beside a case: RuntimeError: no compiler",
        "skipped: FlexAttention beside a case: its compilations took 50 s",
    ]


def test_a_cleaned_mask_gives_zeros_in_rows_that_see_nothing():
    given, mask = inputs(), torch.randn(1, 2, 3, 3)
    mask[0, 1, 2] = -torch.inf
    result = cuda_beside.cleaned(mask, *given)
    assert not result[:, 2, 1].any()
    torch.testing.assert_close(result, fused_mha.attention(*given, attn_mask=mask).output)

"""Reports of other runtimes: the fastest of them counts, and what cannot be compared is skipped or fails the report."""

import argparse

import pytest

import peer_reports
from benchmark.fakes import InThisProcess, peer, torchs, wrong
from fused_mha.benchmark.peers import version

OPTIONS = argparse.Namespace(seconds=0.1, quick=True, threads=1)


@pytest.fixture
def report(monkeypatch):
    """The module's report in fp32, of peers in the place of the real ones, with the milliseconds of ours and theirs."""

    def of(onnx_runtime, openvino, ours=2.0, theirs=(3.0, 8.0)):
        clock = dict(zip(("ours", "onnxruntime", "openvino"), (ours, *theirs), strict=True))
        monkeypatch.setattr(peer_reports, "PEERS", {"onnxruntime": onnx_runtime, "openvino": openvino})
        monkeypatch.setattr(peer_reports, "Processes", lambda threads: InThisProcess(clock))
        return peer_reports.OF_MODULE["ONNX Runtime and OpenVINO, fp32 inference"](OPTIONS)

    return of


def test_the_ratio_is_that_to_the_fastest_in_the_same_turns(report):
    """The machine is twice as slow in the last of three turns, for all of them."""
    right = peer(torchs)
    found = report(right, right)
    assert found.passes
    assert found.is_right
    assert found.lines[0].startswith("2x32x64x4: 1.50x in 3 turns  ms: ours 2.000 [2.000-3.200]  ")
    assert found.values["geometric_mean"] == pytest.approx(1.5)
    assert found.values["openvino"] == version(right)


def test_a_slower_mean_misses_the_bar(report):
    assert report(peer(torchs), peer(torchs), theirs=(1.9, 8.0)).passes is False


def test_a_wrong_result_fails_the_report_and_has_no_ratio(report):
    found = report(peer(torchs), peer(wrong))
    assert not found.is_right
    assert found.lines[0].startswith("WRONG ")
    assert found.values["cells"] == []


def test_a_runtime_that_is_absent_or_refuses_skips_the_report(report):
    absent = report(peer(torchs), peer(torchs, packages=("no_such_runtime",)))
    expected = "openvino: No module named 'no_such_runtime' (pip install no_such_runtime)"
    assert absent.values == {"skipped": expected}
    assert report(peer(torchs), peer(torchs, "bf16")).values == {"skipped": "openvino is given no bf16"}

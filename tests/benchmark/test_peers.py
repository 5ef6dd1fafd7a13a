"""`python -m fused_mha.benchmark --peers`: who serves, who is wrong, what is said of the others; and the real peers."""

import importlib.util
import json

import pytest
import torch

from benchmark.fakes import SHAPE, InThisProcess, case, peer, refused, run, torchs, wrong
from fused_mha.benchmark import attention_cases, command, comparison, harness, peers, suites
from fused_mha.benchmark.attention_cells import Cell as AttentionCell
from fused_mha.benchmark.module_cells import Cell, Mode, ModuleCall
from fused_mha.benchmark.processes import ContenderError

CELL = Cell(1, 3, 3, 8, 2)


@pytest.fixture
def beside(monkeypatch):
    """Puts peers into the place of the real ones; ours takes 2 ms, and they 3 and 8."""

    def of(**given):
        clock = dict(zip(("ours", *given), (2.0, 3.0, 8.0), strict=False))
        monkeypatch.setattr(command, "PEERS", given)
        monkeypatch.setattr(command, "Processes", lambda threads: InThisProcess(clock))

    return of


def test_each_peer_has_its_speed_up_in_a_table_of_its_own(beside, capsys, tmp_path):
    beside(one=peer(torchs), other=peer(torchs))
    path = tmp_path / "results.json"
    assert run(*SHAPE, "--shape", "1,5,8,2", "--peers", "--json", str(path)) == 0
    version = peers.version(peer(torchs))
    lines = capsys.readouterr().out.splitlines()
    assert f"one {version}, other {version}" in lines[1]
    table = lines[lines.index("") + 1 :]
    assert table[0].split("  ")[-1] == "peer's, ms"
    assert " ".join(table[1].split()) == (
        "fp32, inference, against one, 1x3x8x2 1.50x 2.000 [2.000-3.200] 3.000 [3.000-4.800]"
    )
    assert table[2].startswith("fp32, inference, against other, 1x3x8x2     4.00x")
    assert table[5:] == [
        "against one: geometric mean 1.50x, lowest 1.50x (fp32, inference, against one, 1x3x8x2)",
        "against other: geometric mean 4.00x, lowest 4.00x (fp32, inference, against other, 1x3x8x2)",
    ]
    result = json.loads(path.read_text())
    assert result["peers"] == {"one": version, "other": version}
    row = result["rows"][2]
    assert (row["group"], row["name"], row["fastest"]) == ("fp32, inference, against one", "1x3x8x2", "one")
    assert (row["ratio"], row["timings"].keys()) == (1.5, {"ours", "one"})
    assert [group["name"] for group in result["groups"]][1:] == [
        "fp32, inference, against one",
        "fp32, inference, against other",
    ]


def test_the_mean_of_all_is_that_beside_torch(beside, suite, monkeypatch, capsys):
    beside(one=peer(torchs))
    timings = dict.fromkeys(("ours", "torch", "torch general"), harness.Timing(1.0, 1.0, 1.0))
    monkeypatch.setattr(harness, "measure", lambda case, _: harness.Row(case.group, case.name, timings, 1.0, 1.0))
    (one,) = suites.own_cases([CELL], "fp32", Mode())
    suite(one, one._replace(name="again"))
    run("--peers")
    assert "\nall: geometric mean 1.00x, lowest 1.00x " in capsys.readouterr().out


def test_a_peer_whose_result_is_not_ours_has_no_speed_up_and_status_1(beside, capsys, tmp_path):
    beside(right=peer(torchs), off=peer(wrong))
    path = tmp_path / "results.json"
    assert run(*SHAPE, "--peers", "--json", str(path)) == 1
    out = capsys.readouterr().out
    assert "\nWRONG fp32, inference, against off, 1x3x8x2: Tensor-likes are not close! Mismatched elements: " in out
    assert "against off, 1x3x8x2 " not in out
    assert "against right, 1x3x8x2 " in out
    result = json.loads(path.read_text())
    assert result["wrong"] == ["fp32, inference, against off, 1x3x8x2"]
    assert [row["fastest"] for row in result["rows"]][1:] == ["right"]


def test_no_peer_is_timed_where_our_own_result_is_wrong(beside, suite, capsys):
    def fail():
        raise AssertionError("it is off")

    beside(one=peer(lambda call: pytest.fail("it was called")))
    (right,) = suites.own_cases([CELL], "fp32", Mode())
    suite(right._replace(verify=fail))
    assert run("--peers") == 1
    assert "against" not in capsys.readouterr().out


def test_what_a_peer_is_not_given_is_named_once_for_each_reason(beside, suite, capsys):
    beside(one=peer(torchs, "masks"))
    of_cells = suites.own_cases([CELL, Cell(1, 5, 5, 8, 2)], "fp32", Mode())
    suite(*of_cells, case())
    assert run("--peers") == 0
    assert capsys.readouterr().out.endswith(
        "\nno one beside masks: fp32, inference\nno one beside this kind of call: group\n"
    )


def test_ours_and_torchs_are_kept_where_ctrl_c_stops_a_peer(beside, capsys, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    beside(one=peer(torchs))
    monkeypatch.setattr(command, "turns_with", stop)
    path = tmp_path / "results.json"
    assert run(*SHAPE, "--peers", "--json", str(path)) == 130
    assert capsys.readouterr().out.endswith("\nstopped after 1 of 1 cases\n")
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_peer_that_fails_while_it_is_timed_is_named_and_the_others_are_timed_without_it(monkeypatch):
    contenders = InThisProcess({"ours": 2.0, "a": 3.0})
    whole_turns = contenders.turns

    def turns_of(names, seconds):
        if "b" in names:
            raise ContenderError("b", RuntimeError("its process ended"))
        return whole_turns(names, seconds)

    monkeypatch.setattr(contenders, "turns", turns_of)
    (one,) = suites.own_cases([CELL], "fp32", Mode())
    turns = peers.turns_with({"a": peer(torchs), "b": peer(torchs)}, one, contenders, 0.1)
    assert turns.rows(one).keys() == {"a"}
    assert list(map(str, turns.wrong.values())) == ["WRONG fp32, inference, against b, 1x3x8x2: its process ended"]


def test_without_a_name_peers_that_are_not_installed_are_named_and_left_out(beside, capsys):
    beside(there=peer(torchs), absent=peer(torchs, packages=("torch", "no_such_runtime")))
    assert run(*SHAPE, "--peers") == 0
    out = capsys.readouterr().out
    assert "\nno absent: No module named 'no_such_runtime' (pip install torch no_such_runtime)\n" in out
    assert "against there, 1x3x8x2 " in out


def test_a_peer_that_is_asked_for_must_be_known_and_installed(beside, capsys):
    beside(there=peer(torchs), absent=peer(torchs, packages=("no_such_runtime",)))
    assert refused(capsys, "--peers", "there", "absent") == (
        "argument --peers: expected installed peers, absent is not: "
        "No module named 'no_such_runtime' (pip install no_such_runtime)"
    )
    assert refused(capsys, "--peers", "other") == "argument --peers: expected names of there, absent; got 'other'"
    assert refused(capsys, "--peers", "module").endswith("; got 'module' (a suite stands before --peers)")


def test_without_the_option_no_peer_is_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(command, "absence", lambda peer: pytest.fail("it was looked for"))
    assert run(*SHAPE) == 0
    assert "peers" not in capsys.readouterr().out


def test_the_plot_has_the_peers_too_and_says_so(beside, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    beside(one=peer(torchs))
    assert run(*SHAPE, "--peers", "--plot", str(tmp_path / "plot.svg")) == 0
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<!-- fp32, inference, against one, 1x3x8x2 -->" in drawn
    assert "<!-- torch's (or the named peer's) time / ours (longer is better) -->" in drawn


def test_a_peers_case_is_compared_with_that_of_an_earlier_run(beside, capsys, tmp_path):
    beside(one=peer(torchs), other=peer(torchs))
    path = tmp_path / "old.json"
    run(*SHAPE, "--peers", "one", "--json", str(path))
    before = json.loads(path.read_text())
    before["rows"][1]["timings"]["ours"] = {"median": 8.0, "percentile_20": 8.0, "percentile_80": 8.1}
    before["peers"]["one"] = "0.9"
    path.write_text(json.dumps(before))
    capsys.readouterr()
    run(*SHAPE, "--peers", "--compare", str(path))
    lines = capsys.readouterr().out.splitlines()
    (of_one,) = (line for line in lines if "against one, " in line)
    assert of_one.endswith("  4.00x faster")
    assert lines[-2].endswith(" 1 not in it")
    assert lines[-1] == f"not the same conditions: one was 0.9, is {peers.version(peer(torchs))}"


def call_of(**given):
    plain = attention_cases.CALLS[0]
    return attention_cases.AttentionCall(plain._replace(**given), AttentionCell(1, 2, 5, 5, 8))


@pytest.mark.parametrize(
    ("call", "of_onnx_runtime", "of_openvino"),
    [
        (ModuleCall(CELL, Mode()), None, None),
        (ModuleCall(CELL, Mode(torch.bfloat16)), "bf16", None),
        (ModuleCall(CELL, Mode(torch.float16)), "fp16", "fp16"),
        (ModuleCall(CELL, Mode(torch.float64)), "fp64", "fp64"),
        (ModuleCall(CELL, Mode(training=True)), "a training step", "a training step"),
        (ModuleCall(CELL, Mode(weights=True)), "attention weights", "attention weights"),
        (ModuleCall(CELL, Mode(padding=0.5)), "masks", "masks"),
        (ModuleCall(CELL, Mode(causal=True)), "masks", "masks"),
        (ModuleCall(CELL, Mode(attn_mask="bool")), "masks", "masks"),
        (ModuleCall(CELL, Mode(autocast=True)), "autocast", "autocast"),
        (ModuleCall(CELL, Mode(isa="avx2")), "one instruction set", "one instruction set"),
        (ModuleCall(CELL, Mode(device="cuda")), "CUDA", "CUDA"),
        (ModuleCall(CELL, Mode(batch_first=False)), "sequences before batches", "sequences before batches"),
        (ModuleCall(CELL._replace(S=5), Mode()), "cross-attention", "cross-attention"),
        (call_of(), None, "attention without its projections"),
        (call_of(training=True), "a training step", "attention without its projections"),
        (call_of(weights=True), "attention weights", "attention without its projections"),
        (call_of(causal_padding=True), "masks", "attention without its projections"),
        (call_of(dtype=torch.bfloat16), "bf16", "attention without its projections"),
        (call_of(isa="avx2"), "one instruction set", "attention without its projections"),
    ],
    ids=str,
)
def test_what_the_real_peers_are_not_given(call, of_onnx_runtime, of_openvino, monkeypatch):
    monkeypatch.setattr(peers.open_vino, "has_bf16", lambda: True)
    assert peers.PEERS["onnxruntime"].refusal(call) == of_onnx_runtime
    assert peers.PEERS["openvino"].refusal(call) == of_openvino


def test_openvino_is_given_bf16_only_where_it_computes_in_it(monkeypatch):
    monkeypatch.setattr(peers.open_vino, "has_bf16", lambda: False)
    refusal = peers.PEERS["openvino"].refusal(ModuleCall(CELL, Mode(torch.bfloat16)))
    assert refusal == "bf16 on a processor that does not compute in it"


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.")  # OpenVINO calls it
@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize(
    "call",
    [ModuleCall(Cell(2, 17, 17, 64, 4), Mode()), ModuleCall(Cell(2, 17, 17, 64, 4), Mode(torch.bfloat16)), call_of()],
    ids=["module", "module-bf16", "attention"],
)
def test_every_way_of_an_installed_peer_gives_our_result(name, call):
    real = peers.PEERS[name]
    if any(importlib.util.find_spec(package) is None for package in real.packages):
        pytest.skip(f"needs {name}")
    if real.refusal(call) is None:
        peers._fastest(real, call)


def test_the_conditions_of_a_comparison_are_those_of_peers_in_both_runs():
    head = {**dict.fromkeys(comparison.CONDITIONS, 1), "peers": {"one": "1", "other": "1"}}
    earlier = comparison.Earlier(None, {**head, "peers": {"one": "1", "third": "1"}}, {})
    assert len(comparison.summary([], earlier, head)) == 1

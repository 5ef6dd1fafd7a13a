"""`python -m fused_mha.benchmark`: suites, options, what it writes, and what it says of bad input. Nothing is timed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmark.fakes import SHAPE, SHORT, case, refused, run
from fused_mha import MultiHeadAttention
from fused_mha.benchmark import (
    attention_cases,
    command,
    harness,
    module_cases,
    suites,
    yardsticks,
)
from fused_mha.benchmark.harness import Row, Timing
from fused_mha.benchmark.module_cells import Cell, Mode, arguments


def test_own_shapes_are_checked_measured_and_tabled_last(capsys, tmp_path):
    path = tmp_path / "results.json"
    assert run(*SHAPE, "--shape", "2,3,5,8,2", "--json", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"torch {torch.__version__}; cases: 2, some 0.001 s each")
    assert lines[1] == "no share of the peak: there is no C compiler"
    assert lines[2].split() == ["case", "speed-up", "ours,", "ms", "torch,", "ms", "of", "peak", "MiB", "torch's"]
    assert [line.split("  ")[0] for line in lines[3:5]] == ["fp32, inference, 1x3x8x2", "fp32, inference, 2x3->5x8x2"]
    assert lines[5].startswith("fp32, inference: geometric mean ")
    assert lines[6].startswith("all: geometric mean ")
    assert len(lines) == 7
    result = json.loads(path.read_text())
    assert (result["format"], result["wrong"], len(result["groups"])) == (harness.FORMAT, [], 1)
    for row in result["rows"]:
        assert row["ratio"] > 0.0
        assert row["fastest"] in ("torch", "torch general")
        assert row["mib"].keys() == {"ours", row["fastest"]}
        for timing in row["timings"].values():
            assert timing["percentile_20"] <= timing["median"] <= timing["percentile_80"]


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ([], Mode()),
        (["--dtype", "bf16"], Mode(torch.bfloat16)),
        (["--dtype", "fp16"], Mode(torch.float16)),
        (["--dtype", "fp64"], Mode(torch.float64)),
        (["--dtype", "autocast"], Mode(autocast=True)),
        (["--padding", "0.25"], Mode(padding=0.25)),
        (["--causal"], Mode(causal=True)),
        (["--weights"], Mode(weights=True)),
        (["--train"], Mode(training=True)),
        (["--train", "--dropout", "0.1"], Mode(training=True, dropout=0.1)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_of_a_shape_is_one_of_the_call(options, mode, calls, capsys):
    assert run("--shape", "4,5,6,8,2", *options) == 0
    assert [call[:2] for call in calls] == [(Cell(4, 5, 6, 8, 2), mode)]
    words = [word.strip("-") for word in options if word not in ("--dtype", "--train")]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "4x5->6x8x2  " in line)
    assert all(word in line for word in words)


def test_device_is_that_of_the_call(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "_run", lambda cases, options, earlier: len(cases))
    assert command.main([*SHAPE, "--device", "cuda"]) == 1
    assert calls[0][1] == Mode(device="cuda")


def test_all_options_together_pass_the_check(capsys):
    options = ["--dtype", "bf16", "--padding", "0.5", "--causal", "--weights", "--train", "--dropout", "0.1"]
    assert run("--shape", "2,5,7,8,2", *options) == 0
    name = "bf16, training step, padding 0.5, causal, weights, dropout 0.1, 2x5->7x8x2"
    assert f"\n{name}  " in capsys.readouterr().out


@pytest.mark.parametrize(("share", "visible"), [(0.5, 5), (0.25, 7), (0.99, 1)])
def test_padding_hides_that_share_of_the_keys_and_never_all(share, visible):
    hidden = arguments(Cell(2, 3, 10, 8, 2), Mode(padding=share))["key_padding_mask"]
    assert hidden.tolist() == [[place >= visible for place in range(10)]] * 2


def test_threads_are_set_before_the_cases_are_made(calls):
    other = torch.get_num_threads() + 1
    assert run(*SHAPE, "--threads", str(other)) == 0
    assert calls[0][2] == other


def test_seconds_are_those_of_each_case(suite, monkeypatch):
    given = []
    row = Row("group", "a", {"ours": Timing(1.0, 1.0, 1.0), "torch": Timing(1.0, 1.0, 1.0)}, 1.0, 1.0)
    monkeypatch.setattr(harness, "measure", lambda case, seconds: given.append(seconds) or row)
    suite(case())
    command.main(["--seconds", "7"])
    assert given == [7.0]


def test_a_suite_is_chosen_by_name_and_quick_without_one(calls, monkeypatch):
    for name in command.SUITES:
        monkeypatch.setitem(command.SUITES, name, suites.Suite("", lambda name=name: iter([case(name)])))
    chosen = []
    monkeypatch.setattr(command, "_run", lambda cases, options, earlier: chosen.append(cases[0].name) or 0)
    for name in ("module", "attention", "decode"):
        command.main([name])
    command.main([])
    assert chosen == ["module", "attention", "decode", "quick"]


def test_suites_hold_what_their_names_say(calls):
    for name, suite in suites.SUITES.items():
        calls.clear()
        assert len(list(suite.cases())) == len(calls) > 0, name
        cells, modes, _ = zip(*calls, strict=True)
        if name == "decode":
            assert {cell.L for cell in cells} == {1, 8}
        if name == "quick":
            assert max(cell.L for cell in cells) <= 128
            assert {call.group for call in module_cases.CALLS if call.mode.isa is None} <= {
                call.group for call in module_cases.CALLS if call.mode in modes
            }
        if name in ("attention", "module"):
            kind = module_cases.Cell if name == "module" else attention_cases.Cell
            assert all(isinstance(cell, kind) for cell in cells)
        assert {mode.device for mode in modes if isinstance(mode, Mode)} <= {"cuda" if name == "cuda" else "cpu"}


def test_a_wrong_result_has_no_speed_up_and_status_1(monkeypatch, capsys, tmp_path):
    right, path = MultiHeadAttention.forward, tmp_path / "results.json"
    monkeypatch.setattr(MultiHeadAttention, "forward", lambda self, *a, **k: (right(self, *a, **k)[0] * 1.001, None))
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("it was timed"))
    assert run("--shape", "1,11,8,2", "--json", str(path)) == 1
    out = capsys.readouterr().out
    assert "\nWRONG fp32, inference, 1x11x8x2: " in out
    assert "output: largest error" in out
    result = json.loads(path.read_text())
    assert (result["rows"], result["wrong"]) == ([], ["fp32, inference, 1x11x8x2"])


def test_the_others_are_measured_beside_a_wrong_one(suite, capsys):
    def fail():
        raise AssertionError("it is off")

    suite(case("a", fail), case("b"))
    assert run() == 1
    out = capsys.readouterr().out
    assert "\ngroup, b  " in out
    assert out.endswith("\nWRONG group, a: it is off\n")


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
def test_the_share_of_the_peak_is_that_of_plain_fp32_calls(suite, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "fma_peak", yardsticks.fma_peak)
    path = tmp_path / "results.json"
    (plain,) = suites.own_cases([Cell(1, 3, 3, 8, 2)], "fp32", Mode())
    (causal,) = suites.own_cases([Cell(1, 3, 3, 8, 2)], "fp32", Mode(causal=True))
    suite(plain, causal)
    assert run("--json", str(path)) == 0
    share, none = (row["share_of_peak"] for row in json.loads(path.read_text())["rows"])
    assert 0.0 < share < 1.0
    assert none is None


def test_a_busy_machine_is_named_before_its_ratios(suite, monkeypatch, capsys):
    suite(case())
    cores = os.cpu_count()
    for load, is_busy in ((cores + 0.5, True), (cores, False)):
        monkeypatch.setattr(command, "_load", lambda load=load: load)
        assert run() == 0
        named = f"\nbusy machine: a load of {load:.1f} on {cores} cores, " in capsys.readouterr().out
        assert named is is_busy


def test_memory_is_the_peak_of_a_call_with_its_results(suite, tmp_path):
    def two_mib():
        torch.empty(2**20, dtype=torch.uint8).fill_(1)
        kept = torch.empty(2**19, dtype=torch.uint8)
        return kept, torch.empty(3 * 2**19, dtype=torch.uint8)

    suite(case(ours=two_mib))
    assert run("--json", str(tmp_path / "results.json")) == 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["mib"] == {"ours": 2.0, "torch": 0.0}


def test_ctrl_c_ends_with_what_was_measured(suite, capsys, tmp_path):
    def stop():
        raise KeyboardInterrupt

    suite(case("a"), case("b", stop), case("c"))
    assert run("--json", str(tmp_path / "results.json")) == 130
    out = capsys.readouterr().out
    assert "\ngroup, a  " in out
    assert out.endswith("\nstopped after 1 of 3 cases\n")
    assert [row["name"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ["a"]


def test_ctrl_c_before_the_first_case(monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setitem(command.SUITES, "quick", suites.Suite("", stop))
    assert run() == 130


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_bar_is_for_terminals_alone(is_terminal, suite, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    suite(case())
    assert run() == 0
    assert ("0/1 [" in capsys.readouterr().err) is is_terminal


def test_the_plot_is_drawn(suite, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    suite(case("a"), case("b"))
    assert run("--plot", str(tmp_path / "plot.svg")) == 0
    assert "<!-- group, b -->" in (tmp_path / "plot.svg").read_text()


def test_no_plot_without_matplotlib_is_said(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    suite(case())
    assert run("--plot", str(tmp_path / "plot.png")) == 0
    assert capsys.readouterr().out.endswith("no plot: matplotlib is not installed (pip install matplotlib)\n")
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1,2,3"], "argument --shape: expected positive sizes N,L,E,H or N,L,S,E,H; got '1,2,3'"),
        (["--shape", "1,-2,8,2"], "argument --shape: expected positive sizes N,L,E,H or N,L,S,E,H; got '1,-2,8,2'"),
        (["--shape", "1,2,8,two"], "argument --shape: expected positive sizes N,L,E,H or N,L,S,E,H; got '1,2,8,two'"),
        (["--shape", f"1,2,{2**31},2"], "argument --shape: expected positive sizes "),
        (["--shape", "1,2,9,2"], "argument --shape: expected E divisible by H; got E = 9 and H = 2 in '1,2,9,2'"),
        (
            ["--shape", "1,2000000,8,2"],
            "argument --shape: expected a call whose check fits into memory, that of 1x2000000x8x2 takes 2.38e+05 GiB",
        ),
        (["--shape", "1,1,2000000,2"], "argument --shape: expected a call whose check fits into memory, that of 1x1x2"),
        ([*SHAPE, "module"], "argument --shape: expected without a suite, got it beside module"),
        ([*SHAPE, "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8' (choose from "),
        ([*SHAPE, "--padding", "1"], "argument --padding: expected a number from 0 to below 1, got '1'"),
        ([*SHAPE, "--dropout", "much"], "argument --dropout: expected a number from 0 to below 1, got 'much'"),
        ([*SHAPE, "--dropout", "0.1"], "argument --dropout: expected with --train, as nothing is dropped in inference"),
        ([*SHAPE, "--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from "),
        ([*SHAPE, "--threads", "0"], "argument --threads: expected a whole number from 1 to 1024, got '0'"),
        ([*SHAPE, "--seconds", "inf"], "argument --seconds: expected a positive number of seconds, got 'inf'"),
        ([*SHAPE, "--json", "."], "argument --json: expected a file in a folder that can be written to, got '.'"),
        ([*SHAPE, "--json", "no/such.json"], "argument --json: expected a file in a folder that can be written to, "),
        ([*SHAPE, "--plot", "plot.txt"], "argument --plot: expected a name that ends in .png, .svg, .pdf; got 'plot.t"),
        (["--train"], "argument --train: expected beside --shape alone, a suite has its own calls"),
        (["decode", "--padding", "0"], "argument --padding: expected beside --shape alone, a suite has its own calls"),
        (["slow"], "argument suite: invalid choice: 'slow' (choose from "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_sentence(options, message, capsys):
    assert refused(capsys, *options).startswith(message)


@pytest.mark.parametrize(("options", "name"), [(["cuda"], "suite"), ([*SHAPE, "--device", "cuda"], "--device")])
def test_cuda_without_a_gpu_is_refused(options, name, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = f"argument {name}: cuda needs a CUDA device, and torch finds none on this machine"
    assert refused(capsys, *options) == expected


def test_help_says_what_is_beyond_noise_and_names_the_suites(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = capsys.readouterr().out
    assert "where the medians differ by more than each run's spread" in out
    assert all(f"\n  {name}" in out for name in command.SUITES)


def test_as_a_command_it_prints_nothing_but_its_table():
    """On stderr the profiler, which counts allocations, would write too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_mha.benchmark", *SHAPE, *SHORT, "--causal"],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("fp32, inference, causal, 1x3x8x2  ")

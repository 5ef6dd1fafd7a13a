"""`python -m fused_mha.parity`: exit status, options, table, progress, JUnit and JSON files."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from fused_mha import MultiHeadAttention
from fused_mha.parity import command as parity
from fused_mha.testing import Case, grid

SHORT = [
    Case(),
    Case(sharing="cross", need_weights=False),
    Case("masks", attn_mask="bool"),
    Case("masks", training=False, key_padding_mask="float"),
]
OPTIONS = ["--dtype", "float32"]


@pytest.fixture
def short_grid(monkeypatch):
    """Four cases in the place of the grid; records how it was asked for."""
    calls = []

    def fake(*, full=False):
        calls.append(full)
        return iter(SHORT)

    monkeypatch.setattr(parity, "grid", fake)
    return calls


@pytest.fixture
def wrong_forward(monkeypatch):
    """Our module, one part in a thousand off."""
    right = MultiHeadAttention.forward

    def forward(self, *args, **kwargs):
        output, weights = right(self, *args, **kwargs)
        return output * 1.001, weights

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_short_grid_agrees_in_every_other_dtype(dtype, short_grid, capsys):
    assert parity.main(["--dtype", dtype]) == 0
    assert re.search(rf"^{dtype} +masks +2/2 ", capsys.readouterr().out, re.MULTILINE)


def test_status_is_1_for_a_module_that_is_one_part_in_a_thousand_off(wrong_forward, capsys):
    assert parity.main(OPTIONS) == 1
    out = capsys.readouterr().out
    cases = list(grid())
    assert len([line for line in out.splitlines() if line.startswith("DIFFERS  ")]) > 0.9 * len(cases)
    empty = sum(0 in (case.N, case.L) for case in cases)
    assert out.endswith(f"\n{empty} of {len(cases)} configurations agree\n")  # what is empty can't be wrong


def test_a_difference_is_named_with_case_seed_and_quantity(short_grid, wrong_forward, capsys):
    assert parity.main([*OPTIONS, "--seed", "3"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS  masks, float32: attn_mask=bool  (seed 3)\n  output: largest error " in out
    assert re.search(r"^float32 +plain +0/2 ", out, re.MULTILINE)


def test_an_exception_in_one_configuration_hides_no_other(short_grid, monkeypatch, capsys):
    right = MultiHeadAttention.forward

    def forward(self, *args, attn_mask=None, **kwargs):
        if attn_mask is not None:
            raise OSError("broken")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)
    assert parity.main(OPTIONS) == 1
    out = capsys.readouterr().out
    assert "DIFFERS  masks, float32: attn_mask=bool  (seed 0)\n  OSError: broken\n" in out
    assert out.endswith("\n3 of 4 configurations agree\n")


def test_dtypes_are_repeatable_and_default_to_all(short_grid, capsys):
    parity.main(["--dtype", "float64", "--dtype", "float16"])
    out = capsys.readouterr().out
    assert "8 of 8 configurations" in out
    assert re.findall(r"^(\w+) +plain ", out, re.MULTILINE) == ["float64", "float16"]
    parity.main([])
    assert re.findall(r"^(\w+) +plain ", capsys.readouterr().out, re.MULTILINE) == list(parity.DTYPES)


def test_seed_draws_other_values(short_grid, capsys):
    tables = []
    for seed in ("0", "1", "0"):
        parity.main([*OPTIONS, "--seed", seed])
        out = capsys.readouterr().out
        assert f" on cpu, seed {seed}: 4 configurations\n" in out
        tables.append(out[out.index("dtype ") :])
    assert tables[0] == tables[2] != tables[1]


def test_first_line_says_what_is_compared(short_grid, capsys):
    parity.main(OPTIONS)
    assert capsys.readouterr().out.startswith(
        f"fused_mha {parity.__version__} against torch {torch.__version__} on cpu"
    )


def test_full_asks_for_the_larger_grid(short_grid):
    parity.main(OPTIONS)
    parity.main([*OPTIONS, "--full"])
    assert short_grid == [False, True]
    assert len(list(grid(full=True))) > len(list(grid()))


def test_junit_file_counts_cases_and_failures(short_grid, tmp_path, monkeypatch):
    right = MultiHeadAttention.forward

    def forward(self, *args, **kwargs):
        output, weights = right(self, *args, **kwargs)
        return output * (1.001 if kwargs["attn_mask"] is not None else 1.0), weights

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)
    path = tmp_path / "new" / "parity.xml"
    assert parity.main([*OPTIONS, "--junit", str(path)]) == 1
    suite = ET.parse(path).getroot()
    assert suite.tag == "testsuite"
    assert (suite.get("tests"), suite.get("failures")) == ("4", "1")
    assert [element.get("name") for element in suite] == [str(case) for case in SHORT]
    assert all(float(element.get("time")) > 0.0 for element in suite)
    (failed,) = [element for element in suite if element.find("failure") is not None]
    assert failed.get("name") == "masks, float32: attn_mask=bool"
    assert failed.find("failure").get("message").startswith("output: largest error ")
    assert "grad of in_proj_weight: largest error" in failed.find("failure").text


def test_junit_file_of_agreement_has_no_failure(short_grid, tmp_path):
    path = tmp_path / "parity.xml"
    assert parity.main([*OPTIONS, "--junit", str(path)]) == 0
    suite = ET.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("4", "0")
    assert suite.findall(".//failure") == []


def test_json_file_has_every_comparison(short_grid, tmp_path):
    path = tmp_path / "new" / "parity.json"
    assert parity.main([*OPTIONS, "--seed", "3", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert {name: document[name] for name in ("fused_mha", "torch", "device", "seed")} == {
        "fused_mha": parity.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "seed": 3,
    }
    assert [result["name"] for result in document["results"]] == [str(case) for case in SHORT]
    first = document["results"][0]
    assert (first["group"], first["dtype"], first["error"], first["agrees"]) == ("plain", "float32", None, True)
    output = first["comparisons"][1]
    assert (output["quantity"], output["agrees"], len(output["where"])) == ("output", True, 3)
    assert 0.0 < output["error"] <= output["tolerance"]


def test_json_file_says_what_is_not_finite_by_null(short_grid, tmp_path, monkeypatch):
    right = MultiHeadAttention.forward

    def forward(self, *args, **kwargs):
        output, weights = right(self, *args, **kwargs)
        return output * float("nan"), weights

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)
    path = tmp_path / "parity.json"
    assert parity.main([*OPTIONS, "--json", str(path)]) == 1
    output = json.loads(path.read_text())["results"][0]["comparisons"][1]
    assert (output["quantity"], output["agrees"], output["error"]) == ("output", False, None)


def test_plain_lines_where_there_is_no_terminal(short_grid, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    parity.main(OPTIONS)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.findall(r"^  \d of 4$", captured.out, re.MULTILINE) == [f"  {i} of 4" for i in range(4)]


def test_progress_bar_on_a_terminal(short_grid, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    parity.main(OPTIONS)
    captured = capsys.readouterr()
    assert re.search(r"0%\|.*\| 0/4 \[", captured.err)
    assert re.findall(r"^  \d of 4$", captured.out, re.MULTILINE) == []


@pytest.mark.parametrize(
    "options", [["--dtype", "int8"], ["--seed", "one"], ["--device", "gpu"], ["--unknown"]], ids=str
)
def test_wrong_options_exit_with_2(options, capsys):
    with pytest.raises(SystemExit) as raised:
        parity.main(options)
    assert raised.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_as_a_command_it_agrees_over_the_whole_grid_and_prints_nothing_but_its_table(tmp_path):
    path = tmp_path / "parity.xml"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_mha.parity", "--dtype", "float32", "--junit", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    count = len(list(grid()))
    assert run.stdout.endswith(f"\n{count} of {count} configurations agree\n")
    assert ET.parse(path).getroot().get("tests") == str(count)

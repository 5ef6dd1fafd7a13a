"""`python -m fused_mha.benchmark --compare`: what is beyond noise, and which files are refused."""

import json

import pytest
import torch

from benchmark.fakes import case, refused, run
from fused_mha.benchmark import comparison, harness
from fused_mha.benchmark.harness import Row, Timing


def earlier_file(path, **medians):
    """A file of an earlier run, in which a time scatters by 0.2 ms."""
    head = harness.environment("cpu", torch.get_num_threads(), 1.0)
    rows = [
        {"group": "group", "name": name, "timings": {"ours": timing(median)._asdict()}}
        for name, median in medians.items()
    ]
    path.write_text(json.dumps({**head, "rows": rows}))
    return path


def timing(median):
    return Timing(median, median - 0.1, median + 0.1)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (timing(1.0), timing(1.19), "within noise"),
        (timing(1.0), timing(1.21), "slower"),
        (timing(1.0), timing(0.79), "faster"),
        (Timing(1.0, 0.5, 1.5), timing(1.9), "within noise"),  # of the larger spread of the two
        (timing(1.9), Timing(1.0, 0.5, 1.5), "within noise"),
    ],
)
def test_what_is_beyond_noise_differs_by_more_than_either_run_scatters(before, now, expected):
    assert comparison.verdict(now, before) == expected


def test_an_earlier_run_is_compared_case_by_case(suite, monkeypatch, capsys, tmp_path):
    path = earlier_file(tmp_path / "old.json", a=2.0, b=0.5, c=1.1)
    monkeypatch.setattr(
        harness, "measure", lambda case, _: Row("group", case.name, dict.fromkeys(("ours", "torch"), timing(1.0)), 1, 1)
    )
    suite(*map(case, "abcd"))
    assert run("--compare", str(path)) == 0
    out = capsys.readouterr().out
    table = {line[:8].split()[-1]: line for line in out.splitlines() if line.startswith(("case", "group, "))}
    assert table["case"].endswith("  to old.json")
    assert table["a"].endswith("  2.00x faster")
    assert table["b"].endswith("  0.50x slower")
    assert table["c"].endswith("  1.10x within noise")
    assert table["d"].endswith("  0.0")  # MiB come last
    assert out.endswith(f"\nagainst {path}: 1 faster, 1 slower, 1 within noise, 1 not in it\n")


def test_other_conditions_are_named(suite, capsys, tmp_path):
    path = earlier_file(tmp_path / "old.json", a=1.0)
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "2.0.0", "threads": 99}))
    suite(case())
    run("--compare", str(path))
    *_, threads, of_torch = capsys.readouterr().out.splitlines()
    assert threads == f"not the same conditions: threads was 99, is {torch.get_num_threads()}"
    assert of_torch == f"not the same conditions: torch was 2.0.0, is {torch.__version__}"


def test_what_json_writes_can_be_compared(suite, tmp_path, capsys):
    path = tmp_path / "results.json"
    suite(case())
    assert run("--json", str(path)) == 0
    assert run("--compare", str(path)) == 0
    assert "0 not in it\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not JSON"),
        ("[]", "expected results of format 1; {path} has format None: measure it again"),
        ('{"format": 2}', "expected results of format 1; {path} has format 2: measure it again"),
        ('{"format": 1}', "expected rows with a group, a name and timings of ours; those of {path} have not"),
        ('{"format": 1, "rows": [{"group": "g", "name": "n", "timings": {"ours": {"median": "1"}}}]}', "expected rows"),
    ],
)
def test_a_file_of_no_earlier_run_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    sentence = refused(capsys, "--compare", path)
    assert sentence.startswith("argument --compare: expected ")
    assert message.format(path=path) in sentence

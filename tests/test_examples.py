"""The examples run, say what they should and notice a converted model that is wrong."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fused_mha

pytest.importorskip("matplotlib", reason="the examples draw with matplotlib, of the extra `bench`")

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--steps", "12", "--batch-size", "2", "--context", "16", "--layers", "1", "--embed-dim", "16", "--heads", "2"]
# Beside other test processes, one thread is much faster than several that wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=80, check=False, env=ENVIRONMENT)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


@pytest.fixture
def train_text_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("train_text_model", monkeypatch)
    text = module.Text(torch.arange(2000) % 7, list("abcdefg"), 1)
    monkeypatch.setattr(module, "standard_library_text", lambda: text)
    return module


def assert_is_picture(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")  # whole
    assert len(content) > 20_000


def test_quickstart_agrees_with_torch_in_six_uses() -> None:
    result = run("quickstart.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"6 of 6 uses agree with torch {torch.__version__}" in result.stdout
    assert result.stdout.count("largest difference") == 11  # of outputs, and of weights where there are some
    for shape in ("(2, 5, 16)", "(2, 5, 5)", "(10, 32, 256)", "(32, 10, 10)", "(10, 4, 512)", "(2, 4, 6, 9)"):
        assert shape in result.stdout


def test_quickstart_fails_on_a_module_that_is_wrong_by_a_thousandth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = load("quickstart", monkeypatch)

    class WrongAttention(fused_mha.MultiHeadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = super().forward(*args, **kwargs)
            return output * 1.001, weights

    monkeypatch.setattr(quickstart.fused_mha, "MultiHeadAttention", WrongAttention)
    monkeypatch.setattr(quickstart, "USES", quickstart.USES[:1])
    assert quickstart.main([]) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed
    assert "output: largest error" in printed
    assert "0 of 1 uses agree" in printed


def test_text_training_compares_both_models(tmp_path: Path) -> None:
    out = tmp_path / "results"
    result = run("train_text_model.py", "--quick", "--steps", "55", "--batch-size", "4", "--out", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (
        "mean loss of the last 6 of 55 steps",
        "tokens per second",
        "largest in the first 50 steps",
        "of the means of the last 6 steps",
        "the converted model writes:\n  |",
    ):
        assert line in result.stdout
    assert "step   55 of 55" in result.stdout  # plain lines, since this is no terminal
    assert_is_picture(out / "train_text_model.png")
    numbers = json.loads((out / "train_text_model.json").read_text())
    assert len(numbers["losses"]["torch"]) == len(numbers["losses"]["converted"]) == 55
    assert numbers["losses"]["converted"][-1] < numbers["losses"]["converted"][0] - 1
    assert numbers["largest_difference_first_steps"] <= 1e-3
    assert min(numbers["tokens_per_second"].values()) > 0
    assert len(numbers["sample"]) > 500
    assert sorted(path.name for path in out.iterdir()) == ["train_text_model.json", "train_text_model.png"]


def test_text_training_fails_on_a_wrong_conversion(
    train_text_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def convert_wrongly(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))

    monkeypatch.setattr(train_text_model.fused_mha, "convert", convert_wrongly)
    assert train_text_model.main([*TINY, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "TOO FAR" in printed.out
    assert "FAILED: the losses differ by up to" in printed.err
    assert_is_picture(tmp_path / "train_text_model.png")


@pytest.mark.parametrize(
    ("ours", "problems"),
    [
        ([2.0] * 100, []),
        ([2.0009] * 100, []),
        ([2.0] * 49 + [2.0011] + [2.0] * 50, ["up to 1.10e-03 in the first 50 steps"]),
        ([2.0] * 50 + [3.0] * 40 + [2.0] * 10, []),
        ([2.0] * 90 + [2.039] * 10, []),
        ([2.0] * 90 + [1.959] * 10, ["2.0000 and 1.9590, differ by 2.05%"]),
        ([2.0] * 10 + [float("nan")] + [2.0] * 89, ["up to nan in the first 50 steps"]),
        ([2.0] * 99 + [float("nan")], ["2.0000 and nan, differ by nan%"]),
        ([3.0] * 100, ["up to 1.00e+00 in the first 50 steps", "differ by 50.00%"]),
    ],
)
def test_losses_that_lie_too_far_apart_are_a_problem(
    train_text_model: ModuleType, ours: list[float], problems: list[str]
) -> None:
    found = train_text_model.compare_losses([2.0] * 100, ours).problems
    assert len(found) == len(problems)
    assert all(text in problem for text, problem in zip(problems, found, strict=True))


def test_interrupted_training_reports_the_whole_steps(
    train_text_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole_step = train_text_model.Training.step

    def step(self: Any, *batch: Any) -> None:
        whole_step(self, *batch)
        if len(self.losses) == 5:  # the other one has taken four steps
            raise KeyboardInterrupt

    monkeypatch.setattr(train_text_model.Training, "step", step)
    assert train_text_model.main([*TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted after 4 of 12 steps" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "train_text_model.json").read_text())
    assert [len(losses) for losses in numbers["losses"].values()] == [4, 4]
    assert_is_picture(tmp_path / "train_text_model.png")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(EXAMPLES / "train_text_model.py"), *TINY, "--steps", "100000"]
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits none
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        signal.signal(signal.SIGINT, former)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("  step"):
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, printed + errors
    assert "interrupted after" in printed
    assert "Traceback" not in errors
    assert_is_picture(tmp_path / "train_text_model.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "argument --steps: must be a whole number from 1 up; got '0'"),
        ("--context x", "argument --context: must be a whole number from 1 up; got 'x'"),
        ("--seed -1", "argument --seed: must be a whole number from 0 to 2**63 - 1; got '-1'"),
        ("--heads 3 --embed-dim 64", "--heads must divide --embed-dim; got 3 and 64"),
        ("--context 2000", "--context must be less than the text's 2000 characters; got 2000"),
        ("--learning-rate nan", "--learning-rate must be positive; got nan"),
        ("--threads 1000000", "cores of this machine; got 1000000"),
        ("--out file/x", "--out file/x: Not a directory"),
    ],
)
def test_bad_options_are_refused_with_the_reason(
    train_text_model: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as exit_:
        train_text_model.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def generate_text(train_text_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("generate_text", monkeypatch)
    monkeypatch.setattr(module, "standard_library_text", train_text_model.standard_library_text)
    return module


GENERATE = ["--quick", "--steps", "3", "--context", "8", "--length", "20"]  # beyond the window, and the ring's memory


def test_a_cache_writes_the_text_of_recomputing(
    generate_text: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert generate_text.main([*GENERATE, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("characters a second") == 2
    assert "both wrote the same text:\n  |" in printed
    numbers = json.loads((tmp_path / "generate_text.json").read_text())
    assert numbers["is_same"]
    assert len(numbers["texts"][0]) > 20
    assert len(numbers["losses"]) == 3


def test_a_cache_that_forgets_fails(
    generate_text: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def forgetful(model: Any) -> Any:
        return lambda codes: model(codes[None, -1:])[0, -1]

    monkeypatch.setattr(generate_text, "with_cache", forgetful)
    assert generate_text.main([*GENERATE, "--out", str(tmp_path)]) == 1
    assert "FAILED: recomputing wrote another text" in capsys.readouterr().out


def test_an_odd_number_of_heads_is_refused(generate_text: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate_text.main(["--heads", "3"])
    assert "--heads must be even: two heads of the query read one of the key; got 3" in capsys.readouterr().err


def test_a_model_of_transformers_writes_the_same_on_both() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; the extra `transformers` has it")
    result = run("use_in_transformers.py", "--prompt", "24", "--write", "6")
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ("sdpa       reads", "fused_mha  reads", "largest difference", "both write the same tokens"):
        assert line in result.stdout


def test_a_model_of_transformers_that_differs_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; the extra `transformers` has it")
    example = load("use_in_transformers", monkeypatch)
    attention = example.integration.attention

    def wrong(*tensors: Any, **keywords: Any) -> Any:
        result = attention(*tensors, **keywords)
        return result._replace(output=result.output * 1.001)

    monkeypatch.setattr(example.integration, "attention", wrong)
    assert example.main(["--prompt", "24", "--write", "2"]) == 1
    assert "is rounding" in capsys.readouterr().out


def test_a_head_learns_to_look_at_the_mirrored_place(tmp_path: Path) -> None:
    result = run("attention_map.py", "--quick", "--steps", "150", "--length", "8", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert_is_picture(tmp_path / "attention_map.png")
    (layer_1,) = [line for line in result.stdout.splitlines() if line.startswith("  layer 1")]
    assert max(float(cell.rstrip("%")) for cell in layer_1.split()[2:]) > 60  # evenly spread, it would be 8
    assert "largest difference from the weights of torch's module" in result.stdout

"""What pytest's and Hypothesis' settings make of warnings and of random draws, in runs of pytest in a process each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

PLUGIN = """
import warnings
import pytest

def pytest_configure(config):
    config.issue_config_time_warning(pytest.PytestWarning("at configuration"), stacklevel=2)
    warnings.warn("at configuration, by itself")

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    warnings.warn("beside a test", DeprecationWarning)
    yield
    warnings.warn("behind a test", stacklevel=2)
"""

TESTS = """
import warnings
import torch

def warn_from(module, **arguments):
    exec("import warnings; warnings.warn('theirs', **arguments)", {"__name__": module, "arguments": arguments})

def test_passes():
    warn_from("some_plugin")
    warn_from("torchvision.models")

def test_warning_of_our_package():
    warn_from("fused_mha.convert")

def test_warning_of_our_package_that_points_to_its_caller():
    warn_from("fused_mha", stacklevel=2)

def test_warning_of_torch():
    warn_from("torch.nn.functional", category=FutureWarning)

def test_warning_of_torchs_module():
    attention = torch.nn.MultiheadAttention(4, 2)
    x = torch.ones(2, 1, 4)
    padding, mask = torch.zeros(1, 2, dtype=torch.bool), torch.zeros(2, 2)
    attention(x, x, x, key_padding_mask=padding, attn_mask=mask)

def test_warning_of_torchs_library():
    torch.ones(1, 2, 3).T
"""


def run(directory, *arguments, plugin="", tests=TESTS, names=("test_it",)):
    (directory / "tests").mkdir()
    for name in names:
        (directory / "tests" / f"{name}.py").write_text(tests)
    (directory / "foreign_plugin.py").write_text(plugin)
    settings = ["-c", PROJECT / "pyproject.toml", "--rootdir", directory, "-p", "no:cacheprovider", "-rA", "-q"]
    environment = os.environ | {"PYTHONPATH": str(directory)}
    environment = {name: x for name, x in environment.items() if not name.startswith(("PYTEST", "COV"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *settings, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=directory,
        check=False,
    )


def test_warnings_of_ours_and_of_torch_fail_a_test_and_those_of_a_plugin_do_not(tmp_path):
    result = run(tmp_path, "-p", "foreign_plugin", "tests", plugin=PLUGIN)
    outcomes = {line.split("::")[1].split()[0]: line.split()[0] for line in result.stdout.splitlines() if "::" in line}
    passed = {name for name, outcome in outcomes.items() if outcome == "PASSED"}
    assert len(outcomes) == TESTS.count("def test_"), result.stdout + result.stderr
    assert passed == {"test_passes"}
    for text in ("at configuration", "at configuration, by itself", "beside a test", "behind a test"):
        assert text in result.stdout + result.stderr


CASES = """
import pytest

@pytest.mark.thorough(one_in=3)
@pytest.mark.parametrize("i", range(7))
def test_some(i):
    print(f"\\nran {i}")

@pytest.mark.parametrize("name", ["always", pytest.param("seldom", marks=pytest.mark.thorough)])
def test_one(name):
    print(f"\\nran {name}")
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tests",), ["0", "3", "6", "always"]),
        (("tests", "--thorough"), [*map(str, range(7)), "always", "seldom"]),
        (("tests/test_it.py::test_one", "tests/test_it.py::test_some[4]"), ["always", "seldom", "4"]),
    ],
    ids=["usual", "thorough", "named"],
)
def test_some_cases_are_run_where_they_are_asked_for(tmp_path, arguments, expected):
    (tmp_path / "conftest.py").write_text((PROJECT / "tests" / "conftest.py").read_text())
    result = run(tmp_path, *arguments, tests=CASES)
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("ran ")] == expected


DRAWS = """
from hypothesis import given, strategies as st

@given(st.integers())
def test_draws(x):
    print(f"\\ndrew {x}")
"""


@pytest.mark.parametrize(("profile", "differs"), [((), False), (("--hypothesis-profile=random",), True)])
def test_two_searches_are_the_same_unless_a_random_one_is_asked_for(tmp_path, profile, differs):
    (tmp_path / "conftest.py").write_text((PROJECT / "tests" / "conftest.py").read_text())
    result = run(tmp_path, *profile, "tests", tests=DRAWS, names=("test_first", "test_second"))
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (
        [line for line in captured.splitlines() if line.startswith("drew")]
        for captured in result.stdout.split("test_draws ___")[1:]
    )
    assert (first != second) is differs
    assert len(first) >= (600 if differs else 40)

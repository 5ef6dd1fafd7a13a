"""`pytest --fused-mha-parity`: the parity grid as tests of a user's run."""

import os
import re
import subprocess
import sys

import pytest

from fused_mha.testing import Case, grid

# In the process of the run, so that a test can put another module or grid in its place.
SHORT = """
import fused_mha.testing

def grid(*, full=False):
    yield fused_mha.testing.Case()
    yield fused_mha.testing.Case("masks", attn_mask="bool", training=False)
    if full:
        yield fused_mha.testing.Case("large")

fused_mha.testing.grid = grid
"""
WRONG = """
from fused_mha import MultiHeadAttention

right = MultiHeadAttention.forward

def forward(self, *args, **kwargs):
    output, weights = right(self, *args, **kwargs)
    return output * (1.0 if kwargs["attn_mask"] is None else 1.001), weights

MultiHeadAttention.forward = forward
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest in a project of one test, with what its conftest.py holds; returns status and output."""
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")

    def call(*options, conftest=""):
        (tmp_path / "conftest.py").write_text(conftest)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            check=False,
            timeout=120,
        )
        return done.returncode, done.stdout

    return call


def test_the_grid_runs_beside_the_tests_with_readable_names(run):
    status, out = run("--fused-mha-parity", "--fused-mha-dtype=float32", "-v", conftest=SHORT)
    assert status == 0, out
    assert re.findall(r"^(\S.*) PASSED", out, re.MULTILINE) == [
        "test_own.py::test_own",
        "fused_mha_parity::plain[float32 defaults]",
        "fused_mha_parity::masks[float32 attn_mask=bool training=False]",
    ]
    assert "collected 3 items" in out


def test_every_dtype_by_default_and_the_larger_grid_when_asked_for(run):
    status, out = run("--fused-mha-parity", "--fused-mha-full", "--collect-only", "-q", conftest=SHORT)
    assert status == 0, out
    names = re.findall(r"^fused_mha_parity::(\w+)\[(\w+) ", out, re.MULTILINE)
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert names == [(group, dtype) for dtype in dtypes for group in ("plain", "masks", "large")]


def test_the_grid_is_that_of_the_command(run):
    status, out = run("--fused-mha-parity", "--fused-mha-dtype=float16", "--collect-only", "-q")
    assert status == 0, out
    assert f"{len(list(grid())) + 1} tests collected" in out
    for case in (Case(), Case("masks", sharing="separate", attn_mask="float per head", key_padding_mask="float")):
        assert f"fused_mha_parity::{case.group}[float16 {str(case).partition(': ')[2]}]\n" in out


def test_selected_by_name(run):
    status, out = run("--fused-mha-parity", "-k", "fused_mha_parity and masks and float64", conftest=SHORT)
    assert status == 0, out
    assert "1 passed, 8 deselected" in out


def test_a_difference_fails_with_its_quantities_and_seed(run):
    options = ("--fused-mha-parity", "--fused-mha-dtype=float32", "--fused-mha-seed=3")
    status, out = run(*options, conftest=SHORT + WRONG)
    assert status == 1, out
    assert "masks, float32: attn_mask=bool training=False (seed 3)\noutput: largest error " in out
    assert "1 failed, 2 passed" in out
    assert "Traceback" not in out


def test_it_is_shared_among_workers(run):
    pytest.importorskip("xdist")
    status, out = run("--fused-mha-parity", "-n2", conftest=SHORT)
    assert status == 0, out
    assert "9 passed" in out


def test_without_the_option_nothing_is_added_and_nothing_imported(run):
    check = "import sys\ndef pytest_sessionfinish():\n    assert 'fused_mha' not in sys.modules\n"
    status, out = run("-v", conftest=check)
    assert status == 0, out
    assert "1 passed" in out
    assert "fused_mha_parity" not in out

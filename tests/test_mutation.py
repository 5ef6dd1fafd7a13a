"""Whether the faults of `tests/mutation` follow the sources; `tests/mutation/run.py` puts them in."""

import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
sys.path.append(str(PROJECT / "tests" / "mutation"))  # as of `run.py`, a script
from faults import FAULTS  # noqa: E402


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_of_a_fault_is_once_in_its_file(fault):
    assert (PROJECT / fault.file).read_text().count(fault.text) == 1
    for argument in fault.tests.split():
        if argument.startswith("tests/"):
            assert (PROJECT / argument.partition("::")[0]).exists()

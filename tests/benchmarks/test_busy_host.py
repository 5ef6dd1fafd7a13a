"""The processes that make a host busy end with the report, however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from busy_host import busy_processes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KILLED = f"""
import os, signal, sys
sys.path.append({str(BENCHMARKS)!r})
from busy_host import busy_processes
with busy_processes(1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_they_run_until_the_report_fails():
    processes = []

    def report():
        with busy_processes(2) as started:
            processes.extend(started)
            assert [process.poll() for process in started] == [None, None]
            raise RuntimeError("the report")

    with pytest.raises(RuntimeError, match="the report"):
        report()
    assert [process.returncode for process in processes] == [-9, -9]


def test_they_end_when_their_parent_is_killed():
    """A pipe that both write to is at its end when the last of them has ended; until then `run` waits."""
    ended = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, timeout=120, check=False)
    assert ended.returncode == -9

"""No test of the benchmark command times anything."""

import pytest
import torch

from benchmark.fakes import nothing
from fused_mha.benchmark import attention_cases, command, cuda_cases, module_cases, suites
from fused_mha.benchmark.harness import BenchCase


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Without a yardstick, whose turns take long, and with the threads as they were."""

    def no_peak(threads):
        raise RuntimeError("there is no C compiler")

    monkeypatch.setattr(command, "fma_peak", no_peak)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr(command, "_load", lambda: 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def suite(monkeypatch):
    """Puts cases into the place of the suite `quick`."""

    def of(*cases):
        monkeypatch.setitem(command.SUITES, "quick", suites.Suite("", lambda: iter(cases)))

    return of


@pytest.fixture
def calls(monkeypatch):
    """What own shapes and suites make cases of; none of them computes anything."""
    found = []

    def module_case(group, name, cell, mode, bar):
        found.append((cell, mode, torch.get_num_threads()))
        return BenchCase(group, name, nothing, {"torch": nothing}, bar, nothing)

    monkeypatch.setattr(module_cases, "module_case", module_case)
    monkeypatch.setattr(cuda_cases, "module_case", module_case)
    monkeypatch.setattr(attention_cases, "attention_case", lambda call, cell: module_case("", "", cell, call, 0.0))
    return found

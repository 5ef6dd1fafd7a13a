"""The pytest plugin: `pytest --fused-mha-parity` adds the parity grid to a test run, one test for each configuration.

pytest loads it by its entry point in every run of an environment that has fused_mha, so it stands outside that package,
whose import takes seconds: without the option nothing is imported.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fused_mha.testing import Case

NAME = "fused_mha_parity"
DTYPES = ("float64", "float32", "bfloat16", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, which mean what those of `python -m fused_mha.parity` do."""
    group = parser.getgroup("fused_mha", "parity of fused_mha with torch")
    group.addoption(
        "--fused-mha-parity",
        action="store_true",
        help=f"compare with the installed torch too, over a grid of configurations; -k {NAME} runs these alone",
    )
    group.addoption("--fused-mha-full", action="store_true", help="the larger grid")
    group.addoption(
        "--fused-mha-dtype",
        action="append",
        choices=DTYPES,
        help="repeatable (default: all)",
    )
    group.addoption("--fused-mha-device", default="cpu", metavar="DEVICE", help="such as cuda (default: cpu)")
    group.addoption("--fused-mha-seed", type=int, default=0, metavar="SEED", help="of all values (default: 0)")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Put the grid behind what the session collects."""
    report = yield
    if isinstance(collector, pytest.Session) and collector.config.option.fused_mha_parity and report.passed:
        report.result = [*report.result, Grid.from_parent(collector, name=NAME, nodeid=NAME)]
    return report


class Grid(pytest.Collector):
    """All configurations that the options ask for."""

    def collect(self) -> Iterator[Configuration]:
        """One test for each configuration and dtype."""
        import torch  # noqa: PLC0415

        from fused_mha.testing import grid  # noqa: PLC0415

        option = self.config.option
        for dtype in option.fused_mha_dtype or DTYPES:
            for case in grid(full=option.fused_mha_full):
                name = f"{case.group}[{dtype} {case.changed}]"
                yield Configuration.from_parent(self, name=name, case=case._replace(dtype=getattr(torch, dtype)))


class Configuration(pytest.Item):
    """The comparison of one configuration."""

    def __init__(self, *, case: Case, **of_pytest: Any) -> None:
        super().__init__(**of_pytest)
        self.case = case

    def runtest(self) -> None:
        """Compare; `ParityError` if something differs."""
        from fused_mha.parity.results import run_case  # noqa: PLC0415

        option = self.config.option
        result = run_case(self.case, option.fused_mha_device, option.fused_mha_seed)
        if result.problems:
            raise ParityError("\n".join(result.problems))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """The quantities that differ, without the lines of this file."""
        if not isinstance(excinfo.value, ParityError):
            return str(super().repr_failure(excinfo))
        return f"{self.case} (seed {self.config.option.fused_mha_seed})\n{excinfo.value}"

    def reportinfo(self) -> tuple[str, None, str]:
        """No file has it: the name alone."""
        return NAME, None, self.name


class ParityError(AssertionError):
    """Something differs from torch; the text has a line for each quantity."""

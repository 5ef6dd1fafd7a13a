"""`MultiHeadAttention` against torch's, by the cases that the package has.

In inference torch's own time is the better of its fast path and its general path. Run it by
`python benchmarks/run.py module`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import busy_host
import module_memory
import module_reports
import peer_reports
from fused_mha.benchmark.harness import BenchCase
from fused_mha.benchmark.module_cases import CALLS, module_cases

GROUPS = {call.group: call.bar for call in CALLS}
REPORTS = {**module_reports.REPORTS, **busy_host.REPORTS, **peer_reports.OF_MODULE, **module_memory.REPORTS}


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every call at every size."""
    return module_cases(quick=options.quick)

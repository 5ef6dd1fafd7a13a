"""The core against torch's, by the cases that the package has. Run it by `python benchmarks/run.py attention`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import attention_memory
import attention_reports
import peer_reports
from fused_mha.benchmark.attention_cases import CALLS, attention_cases
from fused_mha.benchmark.harness import BenchCase

GROUPS = {call.group: call.bar for call in CALLS}
REPORTS = {**attention_reports.REPORTS, **peer_reports.OF_ATTENTION, **attention_memory.REPORTS}


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """Every call at every size."""
    return attention_cases(quick=options.quick)

"""What a figure was measured on, and the folder below `results/` for it. The harness calls this."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from fused_mha.backends.cpu import LIBRARY

CPUINFO = Path("/proc/cpuinfo")
# What a folder's name leaves out: trade marks, the clock, words that every name has, the memory of a GPU.
NO_NAME = re.compile(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+[- ]core|\d+gb|hbm\d\w*)\b")


def device(benchmark: str) -> str:
    """The name of the GPU for the benchmark "cuda" where there is one, else that of the processor."""
    return torch.cuda.get_device_name() if benchmark == "cuda" and torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The model's name as Linux gives it, elsewhere what Python knows."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def isa() -> str:
    """The instruction set in use: of our C++ library, or of torch where there is none."""
    return torch.backends.cpu.get_cpu_capability() if LIBRARY is None else LIBRARY.isa


def folder(benchmark: str) -> str:
    """The folder's name: the device's, and for a processor the instruction set's."""
    name = device(benchmark)
    return f"{slug(name)}_{slug(isa())}" if name == cpu_name() else slug(name)


def slug(name: str) -> str:
    """A name in lower-case words joined by underscores, without what tells nothing: intel_xeon, nvidia_h100."""
    return "_".join(re.findall(r"[a-z0-9]+", NO_NAME.sub(" ", name.lower())))

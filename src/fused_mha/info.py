"""`python -m fused_mha.info`: versions, devices, threads and back ends, for bug reports."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from fused_mha import __version__
from fused_mha.backends import cpu
from fused_mha.backends.triton import assemblers
from fused_mha.core.dispatch import BACKENDS


def main(arguments: Sequence[str] = ()) -> None:
    """Print what this installation is and can do."""
    argparse.ArgumentParser(prog="python -m fused_mha.info", description=__doc__).parse_args(arguments)
    devices = ["cpu"] + [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "fused_mha": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{_processor()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "tiles": _tiles(),
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices),
        "assembler": "; ".join(assemblers()) or "none, without a GPU for the Triton kernels",
    }
    for name, value in rows.items():
        print(f"{name:<10} {value}")
    print("back ends, in order of preference:")
    for candidate in BACKENDS:
        print(f"  {candidate.name:<10} {candidate.summary}")


def _processor() -> str:
    name = cpu.LIBRARY.cpu_name if cpu.LIBRARY is not None else ""
    return f"{name} ({platform.machine()})" if name else platform.machine()


def _tiles() -> str:
    """Whose the processor's tiles are: ours, or those of torch's kernels, which then get calls for them."""
    if cpu.LIBRARY is not None and cpu.LIBRARY.uses_tiles:
        return "AMX, for bfloat16"
    dtypes = () if cpu.LIBRARY is None else cpu.LIBRARY.tile_dtypes
    if torch.bfloat16 not in dtypes:
        return "none (AMX) for bfloat16"
    return (
        "AMX: torch's kernels get bfloat16 products of many rows, and bfloat16 attention between long sequences "
        "(fused_mha.explain says which calls)"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

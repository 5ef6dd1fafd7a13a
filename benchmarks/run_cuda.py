"""All that a GPU is needed for, in one command of less than eight minutes: the tests on CUDA, then the benchmark.

`python benchmarks/run_cuda.py [--out FOLDER]` writes `cuda_tests.xml`, `cuda.json` and `cuda.png`. Without a GPU it is
a dry run: the tests are skipped, and the benchmark runs its small cases on the CPU, by the Triton kernels under
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import run

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = "test_lengths or test_head_sizes"  # few enough for compute-sanitizer


def main() -> int:
    """Returns the exit status: 1 if a test fails or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="folder of what it writes")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case of the benchmark (default: 0.5)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(ROOT / "tests/cuda")]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of the time kernels are compiled
    results = f"--junitxml={options.out / 'cuda_tests.xml'}"
    status = subprocess.run([*pytest, *parallel, results], check=False).returncode
    measured = ["cuda", "--seconds", str(options.seconds), "--out", str(options.out)]
    if not torch.cuda.is_available():
        _put_interpreted_kernels_behind_the_cpu()
        run.main([*measured, "--quick", "--no-bars"])
        return status
    if sanitizer := shutil.which("compute-sanitizer"):
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--error-exitcode", "1", *pytest, "-k", SANITIZED]
        status = max(status, subprocess.run(command, check=False, env=environment).returncode)
    else:
        print("compute-sanitizer is not on the PATH: left out")
    return max(status, run.main(measured))


def _put_interpreted_kernels_behind_the_cpu() -> None:
    from fused_mha.backends import cpu  # noqa: PLC0415
    from fused_mha.backends.triton import launch  # noqa: PLC0415

    cpu._forward = launch.attention
    cpu._backward = launch.attention_backward


if __name__ == "__main__":
    sys.exit(main())

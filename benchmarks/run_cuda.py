"""All that a GPU is needed for, in one command of about six minutes: the tests on CUDA, then the benchmark.

`python benchmarks/run_cuda.py [--out FOLDER]` writes `cuda_tests.log`, `cuda_tests.xml`, `cuda.json` and `cuda.png`,
and prints what failed and the benchmark's table last. Without a GPU it is a dry run: the tests are skipped, and the
benchmark runs its small cases on the CPU, by the Triton kernels under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import bench_cuda

import run

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = "test_lengths or test_head_sizes"  # few enough for compute-sanitizer
LAST_LINES = 60  # of the tests' log


def main() -> int:
    """Returns the exit status: 1 if a test fails or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="folder of what it writes")
    parser.add_argument("--seconds", type=float, default=0.3, help="per case of the benchmark (default: 0.3)")
    parser.add_argument("--test-seconds", type=float, default=240, help="after which tests are stopped (default: 240)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that test (default: one for each core)")
    parser.add_argument("--sanitize", action="store_true", help="run some tests by compute-sanitizer too")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)  # compile for that part of the benchmark
    options = parser.parse_args()
    if options.warm is not None:
        bench_cuda.warm(options.warm)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    warming = [_start(["--warm", str(part)], options.out) for part in range(bench_cuda.PARTS)] if has_gpu else []
    status = _test(options)
    for process in warming:
        process.wait()
    measured = ["cuda", "--seconds", str(options.seconds), "--out", str(options.out)]
    if not has_gpu:
        _put_interpreted_kernels_behind_the_cpu()
        run.main([*measured, "--quick", "--no-bars"])
        return status
    if options.sanitize:
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ["compute-sanitizer", "--error-exitcode", "1", *_pytest(), "-k", SANITIZED]
        status = max(status, subprocess.run(command, check=False, env=environment).returncode)
    return max(status, run.main(measured))


def _pytest() -> list[str]:
    plugins = ("no:cacheprovider", "no:benchmark")  # pytest-benchmark warns beside xdist, and warnings are errors
    return [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rfE",
        "--tb=short",
        *(f"-p{name}" for name in plugins),
        "tests/cuda",
    ]


def _test(options: argparse.Namespace) -> int:
    """Runs the tests, each worker in its own process, and prints the end of their log."""
    log = options.out / "cuda_tests.log"
    # One test after the other, the longest first, so that no worker is left alone with several.
    parallel = ["-n", str(options.workers), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "100"]
    command = [*_pytest(), *parallel, f"--junitxml={(options.out / 'cuda_tests.xml').resolve()}"]
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(options.test_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest writes what it has
            print(f"stopped the tests after {options.test_seconds:.0f} s")
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            status = 1
    print(*log.read_text().splitlines()[-LAST_LINES:], sep="\n")
    print(f"tests: {time.perf_counter() - start:.0f} s, exit status {status}; all of it is in {log}", flush=True)
    return status


def _start(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    with (out / "warm.log").open("a") as file:
        return subprocess.Popen([sys.executable, __file__, *arguments], stdout=file, stderr=subprocess.STDOUT)


def _put_interpreted_kernels_behind_the_cpu() -> None:
    from fused_mha.backends import cpu  # noqa: PLC0415
    from fused_mha.backends.triton import launch  # noqa: PLC0415

    cpu._forward = launch.attention
    cpu._backward = launch.attention_backward


if __name__ == "__main__":
    sys.exit(main())

"""All that a GPU is needed for, in one command of about six minutes: the tests on CUDA, then the benchmark.

`python benchmarks/run_cuda.py [--out FOLDER]` runs its steps in processes of their own, each for a limited time, and
goes on whatever becomes of them. It writes `cuda_tests.log`, `cuda_tests.xml`, `cuda.json`, `cuda.png`,
`host_time.json` and a log for each step, and prints the table of `cuda_summary.py` last. With `--cpu` it then checks
and measures the processor of that machine, into `cpu/`. Without a GPU it is a dry run: the tests are skipped, and the
benchmark runs its small cases on the CPU, by the Triton kernels under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import bench_cuda
import cuda_summary
import host_time

import run

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
HAS_GPU = bench_cuda.HAS_GPU
IS_FAKE = host_time.INSIDE in os.environ  # a CUDA that does nothing: results are wrong, and not verified
SANITIZED = "test_lengths or test_head_sizes"  # few enough for compute-sanitizer
LAST_LINES = 40  # of a step's log
THREADS = (1, 8, 16)
SECONDS = 350.0  # of all steps on the GPU
LEAST_SECONDS, TO_END = 30.0, 20.0  # of a step, whatever went before; to write what there is


class Step(NamedTuple):
    """A process, stopped when its time is over; what it prints goes into `<name>.log`."""

    name: str
    command: list[str]
    seconds: float
    environment: Mapping[str, str] = MappingProxyType({})  # beside that of this process


def main() -> int:
    """Returns the exit status: 1 if a step fails, a test fails or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="folder of what it writes")
    parser.add_argument("--seconds", type=float, default=0.2, help="per case of the benchmark (default: 0.2)")
    parser.add_argument("--test-seconds", type=float, default=200, help="after which tests are stopped (default: 200)")
    parser.add_argument("--workers", type=int, default=bench_cuda.WORKERS, help="that test (default: up to 16)")
    parser.add_argument("--sanitize", action="store_true", help="run some tests by compute-sanitizer too")
    parser.add_argument(
        "--cpu",
        nargs="?",
        const="too",
        choices=("too", "only"),
        help="check and measure this machine's processor too (many minutes more), or it alone",
    )
    parser.add_argument("--cpu-seconds", type=float, default=240, help="most of each of these steps (default: 240)")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)  # compile for that part of the benchmark
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the benchmark alone
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.warm is not None:
        bench_cuda.warm(options.warm)
        return 0
    if options.measure:
        return _measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    statuses = [] if options.cpu == "only" else _on_gpu(options)
    if options.cpu:
        statuses += _on_cpu(options)
    table = cuda_summary.summary(options.out)
    (options.out / "summary.txt").write_text(table + "\n")
    print(f"\n{table}")
    return min(1, max(map(abs, statuses)))


def _on_gpu(options: argparse.Namespace) -> list[int]:
    """Exit statuses of the steps, which take about `SECONDS`."""
    end = time.monotonic() + SECONDS
    for name in ("cuda_tests.xml", "cuda_tests.log", "cuda.json", "host_time.json"):  # of an earlier run
        (options.out / name).unlink(missing_ok=True)
    warming = [_start_to_warm(part, options.out) for part in range(bench_cuda.PARTS)] if HAS_GPU else []
    statuses = [_run(_tests(options), options.out)]
    warm = time.monotonic() + LEAST_SECONDS
    for process in warming:
        _wait(process, max(0.0, warm - time.monotonic()))
    for step in _gpu_steps(options):
        left = max(LEAST_SECONDS, end - time.monotonic())
        statuses.append(_run(step._replace(seconds=min(step.seconds, left)), options.out))
    if HAS_GPU and options.sanitize:
        statuses.append(_run(_sanitizer(), options.out))
    return statuses


def _on_cpu(options: argparse.Namespace) -> list[int]:
    """Exit statuses of the steps."""
    out = options.out / "cpu"
    out.mkdir(exist_ok=True)
    for path in (*out.glob("*.xml"), *out.glob("*.json"), *out.glob("*.log")):  # of an earlier run
        path.unlink()
    return [_run(step, out) for step in _cpu_steps(options, out)]


def _run(step: Step, out: Path) -> int:
    """Runs a step and prints the end of its log."""
    log, start = out / f"{step.name}.log", time.perf_counter()
    environment = {**os.environ, **step.environment}
    with log.open("w") as file:
        try:
            process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            status = _wait(process, step.seconds)
        except OSError as error:  # there is no such program
            status = 1
            print(f"{step.name}: {error}")
    print(*log.read_text(errors="replace").splitlines()[-LAST_LINES:], sep="\n")
    took = time.perf_counter() - start
    print(f"{step.name}: {took:.0f} s, exit status {status}; all of it is in {log}\n", flush=True)
    return status


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit status of a process; 1 if it had to be stopped."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s")
        process.send_signal(signal.SIGINT)  # pytest writes what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_END)
        process.kill()
        return 1


def _pytest(*arguments: str) -> list[str]:
    """The tests' command, with the plugins that are needed: what else is installed may warn, or fail."""
    plugins = ["no:cacheprovider", *(name for name in ("hypothesispytest", "xdist") if _has_plugin(name))]
    return [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", *(f"-p{name}" for name in plugins), *arguments]


def _has_plugin(name: str) -> bool:
    return importlib.util.find_spec({"hypothesispytest": "_hypothesis_pytestplugin"}.get(name, name)) is not None


_OWN_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _tests(options: argparse.Namespace) -> Step:
    # One test after the other, the longest first, so that no worker is left alone with several.
    order = ["--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "100"]
    parallel = ["-n", str(options.workers), *order] if _has_plugin("xdist") else []
    xml = f"--junitxml={options.out / 'cuda_tests.xml'}"
    return Step("cuda_tests", _pytest("tests/cuda", *parallel, xml), options.test_seconds, _OWN_PLUGINS)


def _gpu_steps(options: argparse.Namespace) -> list[Step]:
    measure = [sys.executable, __file__, "--measure", "--seconds", str(options.seconds), "--out", str(options.out)]
    of_host = [sys.executable, str(BENCHMARKS / "host_time.py"), "--seconds", "0.3", "--out", str(options.out)]
    return [*([Step("host_time", of_host, 60)] if HAS_GPU else []), Step("cuda_benchmark", measure, SECONDS)]


def _sanitizer() -> Step:
    command = ["compute-sanitizer", "--error-exitcode", "1", *_pytest("tests/cuda", "-k", SANITIZED)]
    return Step("sanitizer", command, 600, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **_OWN_PLUGINS})


def _cpu_steps(options: argparse.Namespace, out: Path) -> list[Step]:
    """Those of the processor; none of them sees the GPU."""
    python = [sys.executable]
    parallel = ["-n", str(options.workers)] if _has_plugin("xdist") else []
    commands = {
        "info": [*python, "-m", "fused_mha.info"],
        "parity": [*python, "-m", "fused_mha.parity", "--dtype", "float32", "--junit", str(out / "parity.xml")],
        "native_tests": _pytest("tests/native", *parallel, f"--junitxml={out / 'native_tests.xml'}"),
    }
    quick = [] if HAS_GPU else ["--quick"]  # a dry run
    for threads in (count for count in THREADS if count <= (os.cpu_count() or 1)):
        for name in ("attention", "module"):
            measure = [*python, str(BENCHMARKS / "run.py"), name, "--threads", str(threads), "--seconds", "0.1"]
            commands[f"{name}_{threads}_threads"] = [*measure, *quick, "--no-bars", "--out", str(out)]
    environment = {"CUDA_VISIBLE_DEVICES": "", **_OWN_PLUGINS}
    return [Step(name, command, options.cpu_seconds, environment) for name, command in commands.items()]


def _start_to_warm(part: int, out: Path) -> subprocess.Popen[bytes]:
    with (out / "warm.log").open("a") as file:
        command = [sys.executable, __file__, "--warm", str(part)]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _measure(options: argparse.Namespace) -> int:
    """The benchmark, in this process."""
    measured = ["cuda", "--seconds", str(options.seconds), "--out", str(options.out)]
    if not HAS_GPU:
        _put_interpreted_kernels_behind_the_cpu()
    if IS_FAKE:
        _leave_results_unverified()
    return run.main([*measured, *(["--quick", "--no-bars"] if IS_FAKE or not HAS_GPU else [])])


def _put_interpreted_kernels_behind_the_cpu() -> None:
    from fused_mha.backends import cpu  # noqa: PLC0415
    from fused_mha.backends.triton import launch  # noqa: PLC0415

    cpu._forward = launch.attention
    cpu._backward = launch.attention_backward


def _leave_results_unverified() -> None:
    cases = bench_cuda.cases
    bench_cuda.cases = lambda options: (case._replace(verify=lambda: None) for case in cases(options))


if __name__ == "__main__":
    sys.exit(main())

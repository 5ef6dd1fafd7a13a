"""Host time of calls on CUDA, without a GPU: torch's and Triton's own code as it is, over a CUDA that does nothing.

`python benchmarks/host_time.py` takes a torch for CUDA into out/ (half a gigabyte; none of NVIDIA's packages), builds
the libraries that it links of functions that do nothing (`fake_cuda/`), and prints microseconds a call, ours and
torch's in turns, with the time of torch's operators in a module. On a machine with a GPU it uses that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "host_time"
INSIDE = "FUSED_MHA_FAKE_CUDA"  # set in the process that measures
LOOPS, CALLS = 20, 20  # in a row: the first loops bring the code into the caches again
N, L, H, D = 8, 64, 8, 32  # the kernels do not run, so sizes do not matter
E = H * D


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.11.0", metavar="VERSION", help="of PyPI, where the installed has no CUDA")
    parser.add_argument("--seconds", type=float, default=2.0, help="per group of calls (default: 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of host_time.json")
    options = parser.parse_args()
    if INSIDE not in os.environ and not torch.cuda.is_available():
        return _measure_without_gpu(options.torch)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; microseconds a call, the lowest and the median")
    found = {}
    for title, contenders in _groups():
        found[title] = _timed(contenders, options.seconds)
        print(title)
        for name, (lowest, median) in found[title].items():
            print(f"  {name:<44} {lowest:7.1f} {median:7.1f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host_time.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _measure_without_gpu(version: str) -> int:
    """Runs this script again, by a torch for CUDA."""
    from fake_cuda import libraries  # noqa: PLC0415 - only here

    environment = OUT / f"torch-{version}"
    python = environment / "bin" / "python"
    packages = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        install = [python, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*install, f"torch=={version}"], check=True)
        asked = "import importlib.metadata as m; print(next(r for r in m.requires('torch') if r.startswith('triton')))"
        triton = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout
        subprocess.run([*install, triton.partition(";")[0].strip()], check=True)
        (environment / "ready").touch()
    # Every other package is that of the installed environment, ours too.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in others))
    folder = OUT / f"fake_cuda-{version}"
    libraries.build(packages / "torch" / "lib", folder)
    variables = {"LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder), INSIDE: "1"}
    command = [python, "-W", "ignore::UserWarning", *sys.argv]
    return subprocess.run(command, env=os.environ | variables, check=False).returncode


def _groups() -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """What is timed together: by name."""
    import fused_mha  # noqa: PLC0415 - which loads kernels for the torch that measures

    on_gpu: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    sdpa = F.scaled_dot_product_attention
    query, key, value, grad = (torch.zeros(N, L, H, D, **on_gpu) for _ in range(4))
    padding = torch.zeros(N, L, dtype=torch.bool, device="cuda")
    visible = padding.logical_not()[:, None, None]
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    head_leaves = [x.clone().requires_grad_() for x in heads]

    def ours(*inputs: Tensor, **options: Any) -> Tensor:
        return fused_mha.attention(*inputs, key_padding_mask=padding, **options).output

    def step(of: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(of(), inputs, grad)

    yield (
        "attention, padding",
        {
            "fused_mha.attention, not recorded": lambda: ours(query, key, value),
            "fused_mha.attention, recorded": lambda: ours(*leaves),
            "SDPA, not recorded": lambda: sdpa(*heads, attn_mask=visible),
            "SDPA, recorded": lambda: sdpa(*head_leaves, attn_mask=visible),
        },
    )
    steps = {
        "fused_mha.attention": step(lambda: ours(*leaves), leaves, grad),
        "SDPA": step(lambda: sdpa(*head_leaves, attn_mask=visible), head_leaves, grad.transpose(1, 2)),
    }
    yield "attention, padding, forward + backward", steps
    torch.autograd.set_multithreading_enabled(False)
    yield "attention, padding, forward + backward in the calling thread", steps
    torch.autograd.set_multithreading_enabled(True)
    lengths = iter(range(1, 1 << 30))

    def new_length() -> object:
        rows = query[:1, :1].expand(1, next(lengths) % 4000 + 1, H, D)
        return fused_mha.attention(rows, rows, rows, return_lse=True)

    yield (
        "attention, other kinds, not recorded",
        {
            "no mask (by SDPA)": lambda: fused_mha.attention(query, key, value),
            "causal, padding": lambda: ours(query, key, value, is_causal=True),
            "log-sum-exp": lambda: ours(query, key, value, return_lse=True),
            "averaged weights": lambda: ours(query, key, value, need_weights=True),
            "dropout": lambda: ours(query, key, value, dropout_p=0.1),
            "a length that did not come before": new_length,
        },
    )
    yield from _module_groups(padding, visible, on_gpu)


def _module_groups(
    padding: Tensor, visible: Tensor, on_gpu: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    import fused_mha  # noqa: PLC0415 - as above

    theirs = torch.nn.MultiheadAttention(E, H, batch_first=True, **on_gpu)
    module = fused_mha.MultiHeadAttention(E, H, batch_first=True, **on_gpu)
    x = torch.zeros(N, L, E, **on_gpu)

    def operators() -> Tensor:
        packed = F.linear(x, theirs.in_proj_weight, theirs.in_proj_bias)
        return F.linear(packed[..., :E], theirs.out_proj.weight, theirs.out_proj.bias)

    calls: dict[str, dict[str, Any]] = {
        "no mask, no weights": {"need_weights": False},
        "padding, no weights": {"need_weights": False, "key_padding_mask": padding},
        "weights": {},
        "padding, weights": {"key_padding_mask": padding},
    }
    for name, options in calls.items():
        contenders: dict[str, Callable[[], object]] = {
            "fused_mha.MultiHeadAttention": lambda options=options: module.eval()(x, x, x, **options),
            "nn.MultiheadAttention": lambda options=options: theirs.eval()(x, x, x, **options),
            "its two linear maps": operators,
        }
        yield f"module, inference, {name}", {title: _without_grad(call) for title, call in contenders.items()}
    leaf, grad = x.clone().requires_grad_(), torch.zeros_like(x)

    def step(module: torch.nn.Module, options: dict[str, Any]) -> Callable[[], object]:
        leaves = [leaf, *module.parameters()]
        return lambda: torch.autograd.grad(module.train()(leaf, leaf, leaf, **options)[0], leaves, grad)

    for name, options in calls.items():
        named = {"fused_mha.MultiHeadAttention": module, "nn.MultiheadAttention": theirs}
        yield f"module, training step, {name}", {title: step(of, options) for title, of in named.items()}


def _without_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _timed(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, tuple[float, float]]:
    """Microseconds a call: the lowest and the median of short loops, some in a row of each contender in turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, call in contenders.items():
                for _ in range(LOOPS):
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    times[name].append((time.perf_counter() - start) / CALLS * 1e6)
                torch.cuda.synchronize()
    finally:
        gc.enable()
    return {name: (min(found), statistics.median(found)) for name, found in times.items()}


if __name__ == "__main__":
    sys.exit(main())

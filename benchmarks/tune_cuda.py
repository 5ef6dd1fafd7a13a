"""Times every kernel of the CUDA core by many tiles, and prints the table of `tile_config.py` to paste.

`python benchmarks/tune_cuda.py [--out FOLDER]` compiles first, on all cores, then times in one process: some four
minutes on an H100 with 16 cores. `tiles.json` has all times. Without a GPU it only says how much there is to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import fused_mha
from bench_cuda import WORKERS
from fused_mha.backends.triton import launcher, preparation
from fused_mha.backends.triton.tile_config import Config, Kind, Launch
from fused_mha.core import plans

N, H, L = 4, 16, 4096
HEAD_SIZES = (64, 128)
DTYPE = torch.bfloat16
REPEATS, BEST = 5, 4  # calls that are timed; tiles that are printed
# BLOCK_M, BLOCK_N, warps, stages
TILES = {  # that were among the best of some kind of call
    "forward": [(128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3)],
    "weights": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3)],
    "grad_query": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 4, 3), (128, 128, 8, 2)],
    "grad_key_value": [
        *((32, 128, 4, 3), (32, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 1), (64, 128, 8, 3), (32, 128, 8, 2)),
    ],
}


class Trial(NamedTuple):
    """One call and its gradient, with one tile of each list."""

    D: int
    kind: Kind
    tile: int  # of each list

    def config(self) -> Config:
        """The tiles; those of a shorter list begin again."""
        return Config(**{name: Launch(*tiles[self.tile % len(tiles)]) for name, tiles in TILES.items()})


TRIALS = [Trial(*of) for of in itertools.product(HEAD_SIZES, Kind, range(max(map(len, TILES.values()))))]


class Timed:
    """What is in the place of a launch: milliseconds by kernel."""

    def __init__(self) -> None:
        self._launch, self._events = launcher.Launcher.__call__, list[Any]()

    def __call__(self, of: launcher.Launcher, *operands: Any) -> None:
        """Launch and time one kernel; what does not fit the chip is left out."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            self._launch(of, *operands)
        except Exception as error:  # Triton's OutOfResources, or what its compiler cannot do
            tqdm.write(f"{of.kernel.__name__} {of.how}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            return
        end.record()
        self._events.append((of.kernel.__name__, of.how, start, end))

    def times(self) -> Iterator[tuple[str, Launch, float]]:
        """Of the launches since the last time that this was asked."""
        torch.cuda.synchronize()
        events, self._events = self._events, []
        for name, how, start, end in events:
            yield name, how, start.elapsed_time(end)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="folder of what it writes")
    parser.add_argument("--workers", type=int, default=WORKERS, help="that compile (default: up to 16)")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)  # the share of a worker
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"there is no CUDA device; {len(TRIALS)} calls with up to {len(TILES)} kernels each are to be timed")
        return 0
    timed = Timed()

    def launch(self: launcher.Launcher, tensors: launcher.Tensors, operands: launcher.Tensors) -> None:
        timed(self, tensors, operands)

    launcher.Launcher.__call__ = launch
    if options.compile is not None:
        for trial in TRIALS[options.compile :: options.workers]:
            _run(trial, length=1024)  # the least of which a mask is searched, as it is of longer ones
        return 0
    command = [sys.executable, __file__, "--workers", str(options.workers), "--compile"]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(options.workers)]
    for worker in workers:
        worker.wait()
    found: dict[tuple[int, Kind, str], dict[Launch, float]] = defaultdict(dict)
    for trial in tqdm(TRIALS, disable=not sys.stderr.isatty()):
        _run(trial, length=L)
        list(timed.times())
        times = defaultdict(list)
        for _ in range(REPEATS):
            _run(trial, length=L)
            for name, how, milliseconds in timed.times():
                times[name, how].append(milliseconds)
        for (name, how), measured in times.items():
            if name in TILES:
                found[trial.D, trial.kind, name][how] = statistics.median(measured)
    _report(found, options.out)
    return 0


def _run(trial: Trial, length: int) -> None:
    """One call and its gradient; a call without masks and dropout returns weights too."""
    preparation.config = lambda *_: trial.config()
    torch.manual_seed(0)
    given: dict[str, Any] = {"device": "cuda", "dtype": DTYPE}
    inputs = [torch.randn(N, length, H, trial.D, requires_grad=True, **given) for _ in range(3)]
    arguments: dict[str, Any] = {
        Kind.PLAIN: {},
        Kind.BOOL_MASK: {"attn_mask": torch.ones(1, H, length, length, dtype=torch.bool, device="cuda").triu(1)},
        Kind.DROPOUT: {"dropout_p": 0.1},
        Kind.FLOAT_MASK: {"attn_mask": torch.randn(1, H, length, length, **given)},
    }[trial.kind]
    plans.forget()
    with fused_mha.backend("triton"):
        output = fused_mha.attention(*inputs, **arguments).output
        torch.autograd.grad(output, inputs, torch.ones_like(output))
        if trial.kind is Kind.PLAIN and trial.tile < len(TILES["weights"]):
            with torch.no_grad():
                fused_mha.attention(*(x[:1] for x in inputs), return_lse=True, need_weights=True)


def _report(found: dict[tuple[int, Kind, str], dict[Launch, float]], out: Path) -> None:
    for (D, kind, name), times in found.items():
        ranked = sorted(times.items(), key=lambda item: item[1])[:BEST]
        print(f"D = {D}, {kind.value}, {name}: " + "  ".join(f"{tuple(how)} {ms:.3f} ms" for how, ms in ranked))
    print("_HOPPER = {")
    for kind in Kind:
        print(f"    Kind.{kind.name}: (")
        for D in HEAD_SIZES:
            best = [
                min(times, key=times.get)  # pyright: ignore[reportCallIssue, reportArgumentType]
                for name in Config._fields
                if (times := found.get((D, kind, name)) or found.get((D, Kind.PLAIN, name)))
            ]
            print(f"        Config({', '.join(f'Launch{tuple(how)}' for how in best)}),")
        print("    ),")
    print("}")
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"D": D, "kind": kind.value, "kernel": name, "tile": tuple(how), "ms": round(ms, 4)}
        for (D, kind, name), times in found.items()
        for how, ms in times.items()
    ]
    (out / "tiles.json").write_text(
        json.dumps({"device": torch.cuda.get_device_name(), "times": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())

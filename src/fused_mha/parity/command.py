"""`python -m fused_mha.parity`: compare a grid of configurations, or a model of your own, with the installed torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from fused_mha import ConversionReport, __version__
from fused_mha.parity.model import MODES, load, pair, run_mode
from fused_mha.parity.results import Result, run_case, table, write_json, write_junit
from fused_mha.testing import grid

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOG = """\
--model calls the factory, which takes nothing and returns (model, inputs) or (model, inputs, keywords). A copy with
torch's modules (before) and one that convert has changed (after) are compared in training, evaluation and inference:
outputs, and gradients of the inputs and of all parameters, each judged against the model in fp64.

exit status: 0, 1 if something differs, 2 if an argument is wrong.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 0 if everything agreed and 1 if not."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.model is not None and options.full:
        parser.error("argument --full: expected without --model, which has no grid")
    head = {"fused_mha": __version__, "torch": torch.__version__, "device": options.device, "seed": options.seed}
    heading = f"fused_mha {__version__} against torch {torch.__version__} on {options.device}, seed {options.seed}"
    if options.model is None:
        what, columns, runs = "configurations", (), _runs_of_the_grid(options)
        print(f"{heading}: {len(runs)} configurations")
    else:
        what, columns = "runs", ("after", "before")
        print(f"{heading}: {options.model}")
        try:
            report, runs = _runs_of_a_model(options)
        except ValueError as error:
            parser.error(f"argument --model: {error}")
        print(report)
        head |= {"model": options.model, "changed": report.changed, "skipped": report.skipped}
    results = [run() for run in _with_progress(runs)]
    print(table(results, *columns))
    failures = [result for result in results if result.problems]
    for result in failures:
        print(f"\nDIFFERS  {result.name}  (seed {options.seed})")
        for problem in result.problems:
            print(f"  {problem}")
    print(f"\n{len(results) - len(failures)} of {len(results)} {what} agree")
    if options.junit is not None:
        write_junit(options.junit, results)
    if options.json is not None:
        write_json(options.json, head, results)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_mha.parity",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="PACKAGE.MODULE:FACTORY", help="your own model before and after convert, not the grid"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), action="append", help="repeatable (default: all; of a model, its own)"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="where both modules run (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, inputs and dropout (default: 0)")
    parser.add_argument("--full", action="store_true", help="a larger grid: products of options, larger shapes")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, each comparison by its numbers")
    return parser


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such name; torch was built without it
        raise argparse.ArgumentTypeError(f"torch has no device {text!r} here: {str(error).splitlines()[0]}") from error
    return text


def _runs_of_the_grid(options: argparse.Namespace) -> list[Callable[[], Result]]:
    return [
        partial(run_case, case._replace(dtype=DTYPES[name]), options.device, options.seed)
        for name in options.dtype or DTYPES
        for case in grid(full=options.full)
    ]


def _runs_of_a_model(options: argparse.Namespace) -> tuple[ConversionReport, list[Callable[[], Result]]]:
    torch.manual_seed(options.seed)
    example = load(options.model)
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else [None]
    pairs = [pair(example, options.device, dtype) for dtype in dtypes]
    return pairs[0].report, [partial(run_mode, models, mode, options.seed) for models in pairs for mode in MODES]


def _with_progress(runs: Sequence[Callable[[], Result]]) -> Iterator[Callable[[], Result]]:
    if sys.stderr.isatty():
        yield from tqdm(runs, unit="run", leave=False)
        return
    step = max(1, len(runs) // 10)
    for i, run in enumerate(runs):
        if i % step == 0:
            print(f"  {i} of {len(runs)}", flush=True)
        yield run

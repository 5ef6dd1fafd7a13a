"""`python -m fused_mha.benchmark`: named suites or your own shapes against torch, checked first and timed in turns."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from fused_mha.benchmark import comparison
from fused_mha.benchmark.harness import BenchCase, Wrong, environment, groups_of, save, verified
from fused_mha.benchmark.memory import allocated, allocated_on_gpu
from fused_mha.benchmark.module_cells import Cell, Mode
from fused_mha.benchmark.outcome import Measured, Outcome
from fused_mha.benchmark.peers import PEERS, Peer, absence, turns_with, version
from fused_mha.benchmark.plot import plot
from fused_mha.benchmark.processes import Processes
from fused_mha.benchmark.suites import DTYPES, SUITES, own_cases
from fused_mha.benchmark.yardsticks import Yardstick, fma_peak, share_of

INTERRUPTED = 130  # what a shell makes of Ctrl-C
MOST_THREADS = 1024
MOST_SIZE = 2**31 - 1
CHECKED = 4 * 8  # bytes of the check for each score, input and weight: some copies in fp64
PLOTS = (".png", ".svg", ".pdf")
OF_A_SHAPE = ("dtype", "padding", "causal", "weights", "train", "dropout", "device")
EPILOG = """\
suites:
{suites}

Every case is checked first, by the rule of fused_mha.testing: ours may be twice as far from a result in fp64 as
torch's. A case that fails prints WRONG and has no speed-up. Ours and torch's then run in turns; a time is the median
over the turns, with the 20th and 80th percentiles. In inference torch's is the better of its fast path and its general
path. Of plain fp32 calls the share of the peak of multiply-adds is measured too, where there is a C compiler.
MiB are what a call allocates at most, its results included.

--peers times other runtimes too: those that are named, or all of {peers} that are installed. Each runs in a
process of its own, in turns of some 20 ms with ours in another, so that a case takes several times as long. A peer
whose result is not ours prints WRONG and has no speed-up. What a peer is not given is listed last.

--compare marks what is faster or slower beyond noise: where the medians differ by more than each run's spread from the
20th to the 80th percentile.

exit status: 0, 1 if a result is wrong, 2 if an argument is, 130 after Ctrl-C, which ends with what was measured.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler, which counts allocations, writes to stderr
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        earlier = None if options.compare is None else comparison.read(options.compare)
    except ValueError as error:
        parser.error(f"argument --compare: {error}")
    torch.set_num_threads(options.threads)
    try:
        cases = _cases(parser, options)
        return _run(cases, options, earlier)
    except KeyboardInterrupt:  # before the first case
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    suites = "\n".join(f"  {name:<10} {suite.summary}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m fused_mha.benchmark",
        usage="%(prog)s [suite | --shape N,L,E,H ...] [options]",
        description=__doc__,
        epilog=EPILOG.format(suites=suites, peers=", ".join(PEERS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", nargs="?", choices=list(SUITES), help="named cases (default: quick)")
    parser.add_argument("--threads", type=_count, default=torch.get_num_threads(), help="of torch and ours")
    parser.add_argument("--seconds", type=_seconds, default=0.5, help="for each case (default: 0.5)")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=_plot_file, metavar="FILE", help="draw the ratios (needs matplotlib)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --json, to be compared with")
    parser.add_argument(
        "--peers", type=_peer, nargs="*", metavar="NAME", help=f"time {', '.join(PEERS)} too; no name stands for all"
    )
    own = parser.add_argument_group("your own shapes, of the module")
    own.add_argument(
        "--shape", type=_shape, action="append", metavar="N,L,E,H", help="or N,L,S,E,H with S keys; repeatable"
    )
    own.add_argument("--dtype", choices=list(DTYPES), help="autocast: an fp32 module in bf16 (default: fp32)")
    own.add_argument("--padding", type=_fraction, metavar="P", help="a key_padding_mask that hides this share of keys")
    own.add_argument("--causal", action="store_true", default=None, help="a causal attn_mask")
    own.add_argument("--weights", action="store_true", default=None, help="need_weights=True, averaged over heads")
    own.add_argument("--train", action="store_true", default=None, help="forward and backward, not inference")
    own.add_argument("--dropout", type=_fraction, metavar="P", help="of the attention weights, with --train")
    own.add_argument("--device", choices=["cpu", "cuda"], help="CUDA_VISIBLE_DEVICES chooses among several")
    return parser


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[BenchCase]:
    """Those that are asked for; what does not go together ends the program."""
    if "cuda" in (options.suite, options.device) and not torch.cuda.is_available():
        argument = "suite" if options.device is None else "--device"
        parser.error(f"argument {argument}: cuda needs a CUDA device, and torch finds none on this machine")
    if options.shape is None:
        for name in OF_A_SHAPE:
            if getattr(options, name) is not None:
                parser.error(f"argument --{name}: expected beside --shape alone, a suite has its own calls")
        return list(SUITES[options.suite or "quick"].cases())
    if options.suite is not None:
        parser.error(f"argument --shape: expected without a suite, got it beside {options.suite}")
    if options.dropout and not options.train:
        parser.error("argument --dropout: expected with --train, as nothing is dropped in inference")
    mode = Mode(
        training=bool(options.train),
        weights=bool(options.weights),
        padding=options.padding or 0.0,
        causal=bool(options.causal),
        dropout=options.dropout or 0.0,
        device=options.device or "cpu",
    )
    memory = _memory()
    for cell in options.shape:  # or the system would end this process without a word
        N, L, S, E, H = cell
        needed = CHECKED * (N * H * L * S + N * (L + S) * E + 4 * E**2)
        if needed > memory:
            gib = f"that of {cell} takes {needed / 2**30:.3g} GiB of {memory / 2**30:.3g}"
            parser.error(f"argument --shape: expected a call whose check fits into memory, {gib}")
    return list(own_cases(options.shape, options.dtype or "fp32", mode))


def _memory() -> float:
    """The bytes that this machine has, infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows; another name
        return math.inf


def _load() -> float:
    """The processes that ran at a time in the last minute, none where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows; a container without it
        return 0.0


def _run(cases: Sequence[BenchCase], options: argparse.Namespace, earlier: comparison.Earlier | None) -> int:
    on_gpu = options.suite == "cuda" or (options.device or "cpu") != "cpu"
    head = environment("cuda" if on_gpu else "cpu", options.threads, options.seconds)
    heading = f"{head['device']}, {head['isa']}, {options.threads} threads, torch {torch.__version__}"
    print(f"{heading}; cases: {len(cases)}, some {options.seconds:g} s each", flush=True)
    if (load := _load()) > (cores := os.cpu_count() or 1):
        print(f"busy machine: a load of {load:.1f} on {cores} cores, where threads wait and ratios say little")
    peers = _installed(options.peers)
    head["peers"] = {name: version(peer) for name, peer in peers.items()}
    peak = None
    if any(case.flops for case in cases) and not on_gpu:
        try:
            peak = fma_peak(options.threads)
        except RuntimeError as error:
            print(f"no share of the peak: {error}")
    outcome = Outcome()
    done = 0
    is_stopped = False
    try:
        with Processes(options.threads) as processes:
            for case in tqdm(cases, unit="case", disable=not sys.stderr.isatty(), leave=False):
                one = _measured(case._replace(bar=1.0), options.seconds, peak, on_gpu=on_gpu)
                done += 1
                if isinstance(one, Wrong):
                    outcome.wrong.append(one)
                else:
                    outcome.beside_torch.append(one)
                    outcome.add_turns(case, turns_with(peers, case, processes, options.seconds))
                if options.json is not None:  # now already: the run may be killed
                    save(outcome.as_json(head), options.json)
    except KeyboardInterrupt:
        is_stopped = True
        if options.json is not None:
            save(outcome.as_json(head), options.json)
    print("\n".join(outcome.table(earlier)))
    rows = outcome.rows
    if earlier is not None:
        print("\n".join(comparison.summary(rows, earlier, head)))
    if options.plot is not None and rows:
        plot(rows, groups_of(rows), options.plot, heading, "torch's (or the named peer's)" if peers else "torch's")
    if is_stopped:
        print(f"stopped after {done} of {len(cases)} cases")
        return INTERRUPTED
    return 1 if outcome.wrong else 0


def _installed(names: Sequence[str] | None) -> dict[str, Peer]:
    """The peers of these names, where they are empty all that are installed; the others are named."""
    peers = {} if names is None else {name: PEERS[name] for name in names or PEERS}
    for name, peer in list(peers.items()):
        if reason := absence(peer):
            print(f"no {name}: {reason}")
            del peers[name]
    if peers:
        versions = ", ".join(f"{name} {version(peer)}" for name, peer in peers.items())
        print(f"peers, each in a process of its own, and ours beside them: {versions}")
    return peers


def _measured(case: BenchCase, seconds: float, peak: Yardstick | None, *, on_gpu: bool) -> Measured | Wrong:
    row = verified(case, seconds)
    if isinstance(row, Wrong):
        return row
    share = None
    if peak is not None and case.flops:
        share = share_of(peak, case.ours, case.flops, seconds / 2).share
    fastest = min(case.baselines, key=lambda name: row.timings[name].median)
    calls = {"ours": case.ours, fastest: case.baselines[fastest]}
    mib = {name: allocated_on_gpu(call) if on_gpu else allocated(call)[0] for name, call in calls.items()}
    return Measured(row, fastest, mib, share)


def _peer(text: str) -> str:
    if text not in PEERS:
        hint = " (a suite stands before --peers)" if text in SUITES else ""
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(PEERS)}; got {text!r}{hint}")
    if reason := absence(PEERS[text]):
        raise argparse.ArgumentTypeError(f"expected installed peers, {text} is not: {reason}")
    return text


def _shape(text: str) -> Cell:
    parts = text.split(",")
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in parts]
    if len(sizes) not in (4, 5) or not 1 <= min(sizes) <= max(sizes) <= MOST_SIZE:
        raise argparse.ArgumentTypeError(f"expected positive sizes N,L,E,H or N,L,S,E,H; got {text!r}")
    (N, L), S, (E, H) = sizes[:2], sizes[-3], sizes[-2:]  # of four sizes the second is both lengths
    if E % H != 0:
        raise argparse.ArgumentTypeError(f"expected E divisible by H; got E = {E} and H = {H} in {text!r}")
    return Cell(N, L, S, E, H)


def _number(text: str) -> float:
    """NaN for what is no number, which no range has."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _fraction(text: str) -> float:
    if not 0.0 <= (number := _number(text)) < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return number


def _seconds(text: str) -> float:
    if not 0.0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MOST_THREADS}, got {text!r}")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written to, got {text!r}")
    return path


def _plot_file(text: str) -> Path:
    if Path(text).suffix not in PLOTS:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(PLOTS)}; got {text!r}")
    return _file(text)

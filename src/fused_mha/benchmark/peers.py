"""Other runtimes beside ours, by name: which are installed, which cases they serve, and their times in turns with ours.

`command` has `--peers`, the checkout's `benchmarks/peer_reports.py` compares with the fastest of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fused_mha.benchmark import onnx_runtime, open_vino
from fused_mha.benchmark.attention_cases import AttentionCall
from fused_mha.benchmark.harness import BenchCase, CallAsData, Row, Wrong, median_ms, row_of
from fused_mha.benchmark.module_cells import ModuleCall, Run, assert_close
from fused_mha.benchmark.processes import ContenderError, Make, Processes

TRIAL = 0.1  # seconds for each of a peer's ways to say a call, of which the fastest counts
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


class Peer(NamedTuple):
    """A runtime; ``refusal`` and ``runs`` are of a case's call, and ``runs`` is pickled."""

    packages: tuple[str, ...]  # the last has the version
    refusal: Callable[[Any], str | None]  # what of the call it is not given, None if nothing
    runs: Callable[[Any], Sequence[Run]]  # the ways to say the call, in a process of its own


def absence(peer: Peer) -> str | None:
    """Why a peer cannot be imported, and how to install it; None if it can."""
    try:
        for package in peer.packages:
            importlib.import_module(package)
    except ImportError as error:
        return f"{error} (pip install {' '.join(peer.packages)})"
    return None


def version(peer: Peer) -> str:
    """Of an installed peer."""
    return importlib.import_module(peer.packages[-1]).__version__.partition("-")[0]  # of OpenVINO, no commit


def against(group: str, name: str) -> str:
    """The group of a case's row in which a peer stands in torch's place."""
    return f"{group}, against {name}"


class Turns(NamedTuple):
    """What came of a case: the times of ours and of the peers that serve it, and why there are none of the others."""

    milliseconds: list[dict[str, float]]  # of each turn, by name
    wrong: dict[str, Wrong]
    refused: dict[str, str]  # what of the call the peer is not given here

    def rows(self, case: BenchCase) -> dict[str, Row]:
        """By peer, its time over ours."""
        rows = {}
        for name in self.milliseconds[0] if self.milliseconds else ():
            if name != "ours":
                pair = [{who: turn[who] for who in ("ours", name)} for turn in self.milliseconds]
                rows[name] = row_of(against(case.group, name), case.name, 1.0, pair, [name])
        return rows


def turns_with(peers: Mapping[str, Peer], case: BenchCase, processes: Processes, seconds: float) -> Turns:
    """Time peers in turns with ours, each in its process, in a case whose own results are right.

    Args:
        peers: by name.
        case: the call of which is given to the peers that serve it.
        processes: of ours and the peers, by name.
        seconds: for each of them.

    Returns:
        The times, and the peers that have none.
    """
    call, refused, wrong = case.call, {}, {}
    for name, peer in peers.items():
        if reason := "this kind of call" if call is None else peer.refusal(call):
            refused[name] = reason
    turns: list[dict[str, float]] = []
    if call is not None and len(refused) < len(peers):
        makes: dict[str, Make] = {"ours": call.ours}
        makes |= {name: functools.partial(_fastest, peers[name], call) for name in peers if name not in refused}
        for name, make in makes.items():
            try:
                processes.make(name, make)
            except (AssertionError, RuntimeError) as error:
                wrong[name] = _wrong(case, name, error)
        timed = [name for name in makes if name not in wrong]
        while not turns and "ours" in timed and len(timed) > 1:
            try:
                turns = processes.turns(timed, seconds)
            except ContenderError as error:
                wrong[error.name] = _wrong(case, error.name, error)
                timed.remove(error.name)
    return Turns(turns, wrong, refused)


def _wrong(case: BenchCase, name: str, error: Exception) -> Wrong:
    return Wrong(against(case.group, name), case.name, " ".join(str(error).split()))


def _fastest(peer: Peer, call: CallAsData) -> Run:
    """Of a peer's ways to say the call; raises AssertionError if one of their results is not ours."""
    runs = peer.runs(call)
    for run in runs:
        assert_close(run(), call.ours()())
    return min(runs, key=lambda run: median_ms(run, TRIAL))


def _refusal(call: ModuleCall | AttentionCall, dtypes: Sequence[torch.dtype]) -> str | None:
    """The first thing of a call that no peer is given here, or a dtype that is none of ``dtypes``."""
    if isinstance(call, AttentionCall):
        asked = call.call
        masked, dtype, others = asked.causal_padding, asked.dtype, {}
    else:
        asked, cell = call.mode, call.cell
        masked, dtype = bool(asked.padding or asked.causal or asked.attn_mask), asked.dtype
        others = {
            "CUDA": asked.device != "cpu",
            "autocast": asked.autocast,
            "cross-attention": not cell.is_self_attention,
            "sequences before batches": not asked.batch_first,
        }
    kinds = {
        "a training step": asked.training,
        "attention weights": asked.weights,
        "masks": masked,
        "one instruction set": asked.isa is not None,
        NAMES.get(dtype, "fp32"): dtype not in dtypes,
        **others,
    }
    return next((kind for kind, is_asked in kinds.items() if is_asked), None)


def _onnx_runtime_refusal(call: ModuleCall | AttentionCall) -> str | None:
    return _refusal(call, onnx_runtime.DTYPES)


def _open_vino_refusal(call: ModuleCall | AttentionCall) -> str | None:
    if isinstance(call, AttentionCall):
        return "attention without its projections"
    reason = _refusal(call, open_vino.DTYPES)
    if reason is None and call.mode.dtype == torch.bfloat16 and not open_vino.has_bf16():
        return "bf16 on a processor that does not compute in it"
    return reason


PEERS = {
    "onnxruntime": Peer(onnx_runtime.PACKAGES, _onnx_runtime_refusal, onnx_runtime.runs),
    "openvino": Peer(open_vino.PACKAGES, _open_vino_refusal, open_vino.runs),
}

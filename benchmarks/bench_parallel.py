"""Ring attention and tensor parallelism over processes of this machine: `python benchmarks/run.py parallel`.

The ranks are processes of one thread each, which pass tensors on by gloo. A machine with fewer cores than ranks cannot
show their time side by side. So the ring is judged by processor time, which counts what copying and merging costs: that
of one process on the whole sequence over that of all ranks together, in turns of the same processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import fused_mha
from fused_mha.benchmark.harness import BenchCase, GroupBar, Report
from fused_mha.benchmark.traffic import traffic
from fused_mha.parallel import HeadwiseParallel, ring_attention, shard, unshard
from fused_mha.testing import tolerance

EFFICIENCY = GroupBar(0.8, 0.9)
RANKS = 4
TURNS = 3


class Sequence(NamedTuple):
    """A call over a ring."""

    N: int
    H: int
    L: int  # of the whole sequence
    D: int
    is_causal: bool

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.L}x{self.D}" + (", causal" if self.is_causal else "")


SEQUENCES = (Sequence(1, 4, 16384, 64, False), Sequence(1, 4, 16384, 64, True))  # 4,096 tokens a rank
QUICK = (Sequence(1, 2, 512, 64, True),)


def cases(options: argparse.Namespace) -> Iterator[BenchCase]:
    """There are none: torch's own ring does not run on gloo."""
    return iter(())


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What rank 0 of a group of new processes returns."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(results, f"{folder}/store", rank, size, work, arguments), daemon=True)
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        result = results.get()
        for rank in ranks:
            rank.join()
    if isinstance(result, Exception):
        raise result
    return result


def _rank(results: Any, store: str, rank: int, size: int, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = work(*arguments)
    except Exception as error:
        result = RuntimeError(f"{type(error).__name__}: {error}")
    if rank == 0:
        results.put(result)
    dist.destroy_process_group()


def _step(attend: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> Tensor:
    """A forward and a backward of the sum."""
    for x in tensors:
        x.grad = None
    output = attend(*tensors, **options)
    output.backward(torch.ones_like(output))
    return output.detach()


def _whole(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return fused_mha.attention(query, key, value, **options).output


def measure_ring(sequence: Sequence) -> tuple[list[float], list[float], bool]:
    """Seconds of the processor by turn: one process on the whole, all ranks together; and whether they agree."""
    torch.manual_seed(0)
    N, H, L, D, is_causal = sequence
    whole = [torch.randn(N, L, H, D, requires_grad=True) for _ in range(3)]
    parts = [shard(x.detach()).requires_grad_() for x in whole]
    speaks = dist.get_rank() == 0
    alone, together = [], []
    expected, is_right = torch.empty(0), True
    for turn in range(TURNS + 1):  # of which the first warms up
        seconds = torch.zeros(2, dtype=torch.float64)
        if speaks:
            start = time.process_time()
            expected = _step(_whole, whole, is_causal=is_causal)
            seconds[0] = time.process_time() - start
        dist.barrier()  # the others have waited without work
        start = time.process_time()
        output = _step(ring_attention, parts, is_causal=is_causal)
        dist.barrier()
        seconds[1] = time.process_time() - start
        dist.all_reduce(seconds)
        if turn:
            alone.append(float(seconds[0]))
            together.append(float(seconds[1]))
            continue
        results = [unshard(x) for x in (output, *(part.grad for part in parts if part.grad is not None))]
        if speaks:
            for result, x in zip(results, (expected, *(x.grad for x in whole if x.grad is not None)), strict=True):
                error, largest = float((result - x).abs().max()), float(x.abs().max())
                is_right = is_right and error <= tolerance(torch.float32, 0.0, largest, terms=L)
    return alone, together, is_right


def ring_efficiency(options: argparse.Namespace) -> Report:
    """Processor time of one process over that of four, forward and backward."""
    lines, cells, are_right = [], [], True
    for sequence in QUICK if options.quick else SEQUENCES:
        alone, together, is_right = on_ranks(RANKS, measure_ring, sequence)
        efficiency = statistics.median(a / b for a, b in zip(alone, together, strict=True))
        one, all_ = statistics.median(alone), statistics.median(together)
        wrong = "" if is_right else ", WRONG"
        lines.append(f"{sequence}: one process {one:.2f} s, {RANKS} ranks {all_:.2f} s, {efficiency:.2f}{wrong}")
        cells.append({"name": str(sequence), "seconds": {"one": alone, "ranks": together}, "efficiency": efficiency})
        are_right = are_right and is_right
    lowest = min(float(cell["efficiency"]) for cell in cells)
    lines.append(f"lowest {lowest:.2f} (at least {EFFICIENCY.at_least}, aim {EFFICIENCY.aim})")
    values = {"cells": cells, "lowest": lowest, **EFFICIENCY._asdict()}
    return Report(lines, values, None if options.quick else lowest >= EFFICIENCY.at_least, are_right)


def measure_heads(N: int, L: int, E: int) -> dict[str, int]:
    """Bytes that one rank hands to collectives in a forward of a module whose heads are spread over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("heads",))
    module = fused_mha.MultiHeadAttention(E, E // 64, batch_first=True)
    HeadwiseParallel()._apply(module, mesh)
    x = torch.randn(N, L, E)
    with traffic() as handed:
        module(x, x, x, need_weights=False)
    return dict(handed)


def heads_traffic(options: argparse.Namespace) -> Report:
    """What tensor parallelism over two ranks sends in a forward."""
    N, L, E = (2, 64, 128) if options.quick else (8, 512, 768)
    handed = on_ranks(2, measure_heads, N, L, E)
    expected = N * L * E * 4
    line = f"{N}x{L}x{E}, fp32: {handed}; one output, (N, L, E), has {expected}"
    return Report([line], {"handed": handed, "one_output": expected}, handed["all_reduce"] == expected)


REPORTS = {
    f"ring attention on {RANKS} processes: processor time of one process over theirs": ring_efficiency,
    "heads over 2 processes: bytes of a forward": heads_traffic,
}

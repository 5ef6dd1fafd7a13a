"""The fastest of other runtimes beside ours, by the package's peers: reports of `bench_module`, `bench_attention`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable

import torch

from fused_mha.benchmark import attention_cases, attention_cells, module_cells
from fused_mha.benchmark.harness import BenchCase, GroupBar, Report, row_of, skipped
from fused_mha.benchmark.module_cases import module_case
from fused_mha.benchmark.peers import PEERS, absence, turns_with, version
from fused_mha.benchmark.processes import Processes


def _report(names: Iterable[str], cases: Iterable[BenchCase], bar: GroupBar, options: argparse.Namespace) -> Report:
    """The time of the fastest peer over ours, the median over the turns."""
    peers = {name: PEERS[name] for name in names}
    if absent := [f"{name}: {reason}" for name, peer in peers.items() if (reason := absence(peer))]:
        return skipped("; ".join(absent))
    lines, rows, is_right = [], [], True
    with Processes(options.threads) as processes:
        for case in cases:
            case.verify()
            turns = turns_with(peers, case, processes, options.seconds)
            if turns.refused:
                return skipped("; ".join(f"{name} is given no {reason}" for name, reason in turns.refused.items()))
            if turns.wrong:
                is_right = False
                lines += map(str, turns.wrong.values())
                continue
            row = row_of(case.group, case.name, case.bar, turns.milliseconds, list(peers))
            lines.append(f"{row.name}: {row.ratio:.2f}x in {len(turns.milliseconds)} turns  ms: {row.milliseconds}")
            rows.append(row)
    versions = {name: version(peer) for name, peer in peers.items()}
    values = {**versions, "cells": [row.as_json for row in rows], **bar._asdict()}
    if not is_right:
        return Report(lines, values, False, is_right)
    mean = statistics.geometric_mean(row.ratio for row in rows)
    lines.append(f"geometric mean {mean:.2f}x (at least {bar.at_least:.2f}, aim {bar.aim:.2f})")
    return Report(lines, {**values, "geometric_mean": mean}, mean >= bar.at_least)


def _module(dtype: torch.dtype, *names: str, options: argparse.Namespace) -> Report:
    cells = (
        module_cells.QUICK_SELF_ATTENTION if options.quick else (*module_cells.SELF_ATTENTION, module_cells.SMALL[0])
    )
    mode = module_cells.Mode(dtype)
    cases = (module_case("", str(cell), cell, mode, 0.0) for cell in cells)
    return _report(names, cases, GroupBar(1.0, 1.1), options)


def module_fp32(options: argparse.Namespace) -> Report:
    """Each by the fastest of its ways to say the module."""
    return _module(torch.float32, "onnxruntime", "openvino", options=options)


def module_bf16(options: argparse.Namespace) -> Report:
    """Both in bf16 from input to output."""
    return _module(torch.bfloat16, "openvino", options=options)


def attention_fp32(options: argparse.Namespace) -> Report:
    """ONNX Runtime's own fused `MultiHeadAttention`."""
    call = attention_cases.CALLS[0]
    cells = attention_cells.QUICK if options.quick else attention_cells.MAIN
    cases = (attention_cases.attention_case(call, cell) for cell in cells)
    return _report(("onnxruntime",), cases, GroupBar(1.05, 1.2), options)


OF_MODULE = {"ONNX Runtime and OpenVINO, fp32 inference": module_fp32, "OpenVINO, bf16 inference": module_bf16}
OF_ATTENTION = {"ONNX Runtime, fp32 forward": attention_fp32}

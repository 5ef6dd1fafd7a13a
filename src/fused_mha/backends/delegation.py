"""Who serves a call on CUDA, our kernels or torch's: one table of rules, each with the measurement that it stands on.

`triton` asks for the rule of a call, `sdpa` for that of a module's call; `explain` prints the one that decided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fused_mha.core.inputs import AttentionInputs
from fused_mha.core.modes import is_recorded
from fused_mha.ops.module import GRADIENTS, Call

MOST_HEADS_OF_TORCH = 65535  # in a batch, that all of torch's own kernels take
MOST_SCORES = 1 << 28  # that torch's operators may hold of a call in fp32: 1 GiB for each tensor of them

RECORDED = "benchmarks/results/nvidia_h100/cuda.json"
FIRST_RUN = "the first run on an H100, 2026-11-27"  # by other tiles; its figures are in no file of this repository


class Measured(NamedTuple):
    """Torch's best time over ours: the lowest and the highest of the cells of some groups of `bench_cuda`."""

    what: str
    lowest: float
    highest: float
    groups: tuple[str, ...] = ()  # of the file `where`
    kinds: tuple[str, ...] = ()  # of a group's cells, what comes after their sizes; all if empty
    where: str = RECORDED

    def __str__(self) -> str:
        return f"{self.what}: torch's best takes {self.lowest:.2f} to {self.highest:.2f} times as long, {self.where}"


class Rule(NamedTuple):
    """Which back end serves the calls for which `holds`, and why; the first of a table that holds decides."""

    name: str
    serves: str
    holds: Callable[[Any], bool]
    reason: str
    measured: Measured | None = None  # None where there is nothing to time, or nothing was timed

    def __str__(self) -> str:
        return f"{self.reason} ({self.measured or 'not timed'})"


def _is_plain(inputs: AttentionInputs) -> bool:
    has_virtual_keys = inputs.bias_k is not None or inputs.add_zero_attn
    return not (inputs.need_weights or inputs.needs_mask_tensor() or inputs.dropout_p > 0.0 or has_virtual_keys)


def _is_of_many_heads(inputs: AttentionInputs) -> bool:
    return inputs.query.shape[0] * inputs.query.shape[2] > MOST_HEADS_OF_TORCH


def _is_single(inputs: AttentionInputs) -> bool:
    return inputs.query.shape[1] == 1


def _is_float32(inputs: AttentionInputs) -> bool:
    return inputs.query.dtype == torch.float32


def _has_float32_mask_that_learns(inputs: AttentionInputs) -> bool:
    masks = (inputs.attn_mask, inputs.key_padding_mask)
    return _is_float32(inputs) and any(mask is not None and mask.requires_grad for mask in masks)


def _has_float32_weights(inputs: AttentionInputs) -> bool:
    return _is_float32(inputs) and inputs.need_weights


def _is_grouped(inputs: AttentionInputs) -> bool:
    return inputs.query.shape[2] != inputs.key.shape[2]


def _is_grouped_with_other_values(inputs: AttentionInputs) -> bool:
    return _is_grouped(inputs) and inputs.query.shape[3] != inputs.value.shape[3]


def _has_many_float32_scores(inputs: AttentionInputs) -> bool:
    """Of which torch's operators hold those of every head, or a mask."""
    if not _is_float32(inputs):
        return False
    (N, L, H, _), S = inputs.query.shape, inputs.key.shape[1]
    if inputs.need_weights or _is_grouped(inputs):
        return N * H * L * S > MOST_SCORES
    heads = 1 if inputs.attn_mask is None else inputs.attn_mask.shape[1]
    return inputs.needs_mask_tensor() and N * heads * L * S > MOST_SCORES


def _has_float_mask(inputs: AttentionInputs) -> bool:
    return inputs.attn_mask is not None and inputs.attn_mask.dtype != torch.bool


# In the order in which they are asked, of calls that `triton` could serve; the last is for all others.
RULES = (
    Rule(
        "packed sequences",
        "triton",
        lambda inputs: inputs.cu_seqlens_q is not None,
        "torch's kernel for these takes no float32, dropout or mask, and the host has to know the longest of them",
    ),
    Rule(
        "score options",
        "triton",
        lambda inputs: bool(inputs.score_options()),
        "torch's kernels know no softcap, no sinks and no ALiBi",
    ),
    Rule("log-sum-exp", "triton", lambda inputs: inputs.return_lse, "torch's kernels give no log-sum-exp"),
    Rule("single query", "triton", _is_single, "cuDNN's kernels give NaN for a single query"),
    Rule(
        "many heads",
        "triton",
        _is_of_many_heads,
        f"not all of torch's kernels take more than {MOST_HEADS_OF_TORCH} heads in a batch",
    ),
    Rule(
        "scale",
        "triton",
        lambda inputs: not inputs.scale > 0,
        "torch's kernels multiply what hides a score by the scale: NaN where it is not positive",
    ),
    Rule(
        "everything dropped",
        "triton",
        lambda inputs: inputs.dropout_p == 1.0,
        "torch's kernels divide by 1 - p: NaN where p is 1",
    ),
    Rule(
        "grouped heads, other values",
        "triton",
        _is_grouped_with_other_values,
        "torch has no kernel for grouped heads whose values have another size than their keys: it holds all scores",
    ),
    Rule(
        "fp32, many scores",
        "triton",
        _has_many_float32_scores,
        f"torch's operators would hold more than {MOST_SCORES} scores, or numbers of a mask",
    ),
    Rule(
        "no mask",
        "sdpa",
        _is_plain,
        "nothing but causality hides a key, and torch's own kernels are near the limit there",
        Measured(
            "bf16, forward, and with backward",
            0.72,
            0.88,
            ("own kernels, forward", "own kernels, forward and backward"),
        ),
    ),
    Rule(
        "window",
        "triton",
        lambda inputs: inputs.window is not None,
        "tiles outside the window are left out",
        Measured("bf16, forward, and with backward", 6.05, 9.36, where=FIRST_RUN),
    ),
    Rule(
        "fp32, a mask that learns",
        "triton",
        _has_float32_mask_that_learns,
        "a mask needs a gradient, with which torch's products of float32 were not compared",
    ),
    Rule(
        "fp32, weights",
        "reference",
        _has_float32_weights,
        "torch's products of float32 are faster on a GPU than Triton's",
        Measured("module with weights, fp32, inference", 0.31, 0.52, where=FIRST_RUN),
    ),
    # With dropout too, which torch's kernels then draw; that was not timed.
    Rule(
        "fp32",
        "sdpa",
        _is_float32,
        "torch's products of float32 are faster on a GPU than Triton's",
        Measured("module with padding, fp32, training step", 0.33, 0.50, where=FIRST_RUN),
    ),
    # Torch is faster, but which weights it drops depends on the kernel.
    Rule(
        "dropout",
        "triton",
        lambda inputs: inputs.dropout_p > 0.0,
        "dropout draws from the counters of every fused core of ours",
        Measured("bf16, forward and backward", 0.62, 0.81, ("dropout, forward and backward",)),
    ),
    # Beside them torch's module computes scores in bf16, and holds them for every head.
    Rule(
        "weights",
        "triton",
        lambda inputs: inputs.need_weights,
        "torch's kernels return no weights",
        Measured("module, inference", 0.87, 2.29, ("module, inference", "small module, inference"), ("weights",)),
    ),
    # Torch is faster as it was timed. Its kernels are not known to be right on rows that see nothing, so that the mask
    # would have to be searched for them and copied: three passes over it, which `bench_cuda` times beside ours.
    Rule(
        "float attn_mask",
        "triton",
        _has_float_mask,
        "torch's kernels would need a copy of a float mask, cleaned of the rows that see nothing",
        Measured("bf16, forward and backward, without that copy", 0.73, 0.83, ("float mask, forward and backward",)),
    ),
    Rule(
        "bool attn_mask",
        "triton",
        lambda inputs: inputs.attn_mask is not None,
        "the mask is read where it lies, and tiles that it hides are left out",
        Measured("bf16, forward and backward", 0.87, 1.34, ("causal mask as a tensor, forward and backward",)),
    ),
    Rule(
        "padding",
        "triton",
        lambda inputs: inputs.key_padding_mask is not None,
        "keys that padding hides are left out",
        Measured(
            "bf16, forward and backward",
            0.91,
            1.88,
            ("padding, forward and backward", "causal and padding, forward and backward"),
        ),
    ),
    Rule("other masks", "triton", lambda inputs: True, "virtual keys, or causality that ends at the last key"),
)


def rule_of(inputs: AttentionInputs) -> Rule:
    """The rule that decides about a call on CUDA which both could serve."""
    for rule in RULES[:-1]:  # a generator, Dynamo cannot trace in every torch
        if rule.holds(inputs):
            return rule
    return RULES[-1]


def _is_plain_inference(call: Call) -> bool:
    """Whether torch's operator has all that a call asks for, and takes its fast kernels for it."""
    has_masks = call.attn_mask is not None or call.key_padding_mask is not None or call.is_causal
    is_simple = call.key is None and call.bias_k is None and not (call.add_zero_attn or call.need_weights or has_masks)
    if not is_simple or call.in_bias is None or call.out_bias is None or call.query.dim() != 3 or call.dropout_p:
        return False
    D = call.query.shape[-1] // call.num_heads
    if not call.batch_first or call.query.shape[1] == 1 or D % 8 or not call.query.is_cuda:
        return False
    return not is_recorded(*call[:GRADIENTS])


# Of an eager call of a module, in which the rule "no mask" gives the attention to torch.
MODULE_RULE = Rule(
    "plain inference of a module",
    "sdpa",
    _is_plain_inference,
    "torch's operator of a whole module makes the fewest launches",
    Measured(
        "torch's module, which calls it",
        0.69,
        0.96,
        ("module, inference", "small module, inference"),
        ("plain", "fp32, plain"),
    ),
)

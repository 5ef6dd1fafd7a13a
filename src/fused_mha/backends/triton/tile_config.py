"""How large the tiles of each kernel are, and by how many warps and stages they run; `launch` asks.

A static table by the shared memory of the chip, the dtype, the head size and the kind of call: no tuning at run time,
so that results and speed are the same in every process.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """Of all kernels for one head size."""

    forward: Launch
    weights: Launch
    grad_query: Launch
    grad_key_value: Launch


MOST_HEAD_SIZE = 256
HEAD_SIZES = (64, 128, MOST_HEAD_SIZE)  # up to which the rows below hold
LARGE, MEDIUM, SMALL = 227 << 10, 163 << 10, 99 << 10  # bytes of shared memory of sm_90, sm_80, and sm_86 and others


class Kind(Enum):
    """What of a call takes shared memory and registers beside its tiles; a float mask takes the most."""

    PLAIN = "plain"
    BOOL_MASK = "bool mask"
    DROPOUT = "dropout"
    FLOAT_MASK = "float mask"


# By a sweep on an H100 at 4x16x4096 in bf16, but for the heads above 128 and the weights.
_WEIGHTS = Launch(128, 128, 8, 2)
_LARGEST_HEADS = Config(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(32, 32, 8, 1), Launch(64, 32, 8, 1))
_HOPPER = {
    Kind.PLAIN: (
        Config(Launch(128, 64, 4, 3), _WEIGHTS, Launch(64, 64, 4, 3), Launch(32, 128, 4, 3)),
        Config(Launch(128, 128, 8, 3), _WEIGHTS, Launch(64, 64, 4, 2), Launch(64, 128, 8, 3)),
    ),
    Kind.BOOL_MASK: (
        Config(Launch(128, 64, 4, 3), _WEIGHTS, Launch(64, 64, 4, 3), Launch(32, 128, 4, 3)),
        Config(Launch(128, 128, 8, 2), _WEIGHTS, Launch(64, 64, 4, 2), Launch(64, 128, 8, 2)),
    ),
    Kind.DROPOUT: (
        Config(Launch(128, 64, 4, 4), _WEIGHTS, Launch(64, 64, 4, 3), Launch(32, 64, 4, 3)),
        Config(Launch(128, 128, 8, 2), _WEIGHTS, Launch(64, 64, 4, 2), Launch(32, 128, 8, 2)),
    ),
    Kind.FLOAT_MASK: (
        Config(Launch(128, 64, 4, 3), _WEIGHTS, Launch(64, 64, 4, 3), Launch(64, 128, 8, 1)),
        Config(Launch(128, 64, 8, 2), _WEIGHTS, Launch(64, 64, 4, 2), Launch(32, 128, 8, 2)),
    ),
}
_HALF = {
    MEDIUM: (
        Config(Launch(128, 64, 4, 3), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
        Config(Launch(128, 64, 8, 2), Launch(64, 64, 4, 2), Launch(64, 64, 8, 1), Launch(64, 64, 8, 1)),
        Config(Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 4, 1)),
    ),
    SMALL: (
        Config(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 8, 1), Launch(32, 64, 4, 1)),
        Config(Launch(64, 32, 4, 2), Launch(64, 64, 4, 1), Launch(64, 32, 8, 1), Launch(32, 64, 8, 1)),
        Config(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    ),
}
_FLOAT = (
    Config(Launch(64, 32, 8, 1), Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 4, 1)),
    Config(Launch(32, 32, 8, 1), Launch(32, 32, 4, 1), Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)),
    Config(Launch(16, 16, 8, 1), Launch(16, 32, 8, 1), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1)),
)


def config(shared_memory: int, dtype: torch.dtype, head_size: int, kind: Kind) -> Config:
    """For a chip with so many bytes of shared memory to a block."""
    size = next(i for i, most in enumerate(HEAD_SIZES) if head_size <= most)
    if dtype == torch.float32:
        return _FLOAT[size]
    if shared_memory >= LARGE:
        return (*_HOPPER[kind], _LARGEST_HEADS)[size]
    return _HALF[MEDIUM if shared_memory >= MEDIUM else SMALL][size]

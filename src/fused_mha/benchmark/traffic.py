"""Counts the bytes that this process hands to the collectives of `fused_mha.parallel`, by wrapping them.

`benchmarks/bench_parallel.py` and the tests of `docs/scaling.md` ask.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Count inside a ``with`` block.

    Yields:
        Bytes by name: those that are summed ("all_reduce"), that every rank gets ("all_gather"), and that go to one
        other rank ("send").
    """
    handed: Counter[str] = Counter()
    all_reduce, all_gather, batch = dist.all_reduce, dist.all_gather, dist.batch_isend_irecv

    def summed(tensor: Tensor, *others: Any, **named: Any) -> Any:
        handed["all_reduce"] += tensor.nbytes
        return all_reduce(tensor, *others, **named)

    def gathered(tensors: Sequence[Tensor], tensor: Tensor, *others: Any, **named: Any) -> Any:
        handed["all_gather"] += tensor.nbytes
        return all_gather(tensors, tensor, *others, **named)

    def passed(operations: list[dist.P2POp]) -> Any:
        handed["send"] += sum(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return batch(operations)

    with mock.patch.multiple(dist, all_reduce=summed, all_gather=gathered, batch_isend_irecv=passed):
        yield handed

"""How a sequence is cut over the ranks of a ring so that causal attention gives each the same work: in a zigzag.

Users shard and unshard by it; `ring` asks which queries of a rank see which keys of another, `context` for positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_mha.parallel.groups import Group, check_on_every_rank, group_of


def shard(x: Tensor, group: Group = None, *, dim: int = 1) -> Tensor:
    """This rank's part of a sequence: of 2R equal chunks, rank r of R takes chunk r and chunk 2R - 1 - r.

    With causality the first chunks see few keys and the last ones many. One of each makes the ranks' work equal. For
    R = 2 and a sequence of 8::

        sequence   0 1 2 3 4 5 6 7
        rank       0 0 1 1 1 1 0 0

    Whatever goes by position is sharded alike: tokens, their targets, ``key_padding_mask``, position embeddings.

    Args:
        x: the whole sequence, the same on every rank.
        group: the ranks of the ring: a process group, a mesh of one dimension, or None for all ranks.
        dim: of ``x`` along which the sequence runs.

    Returns:
        The rank's part, 1 / R as long, with a gradient of its own.

    Raises:
        ValueError: 2R does not divide the length.

    Examples:
        >>> tokens = fused_mha.parallel.shard(tokens, mesh["context"])  # (N, L) to (N, L / R)

    Source:
        Zhu, "zigzag ring attention" (github.com/zhuzilin/ring-flash-attention); Llama 3 (arXiv 2407.21783), section
        3.3.2.
    """
    found = group_of(group)
    size, length = dist.get_world_size(found), x.shape[dim]
    if length % (2 * size):
        raise ValueError(
            f"a sequence over {size} ranks must have a length that 2 * {size} = {2 * size} divides; got {length} in "
            f"dimension {dim} of {tuple(x.shape)}"
        )
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[chunk] for chunk in chunks_of(dist.get_rank(found), size)], dim)


@torch.no_grad()
def unshard(x: Tensor, group: Group = None, *, dim: int = 1) -> Tensor:
    """The inverse of `shard`: the whole sequence, on every rank, without a gradient.

    Args:
        x: this rank's part.
        group: as in `shard`.
        dim: of ``x`` along which the sequence runs.

    Returns:
        The whole, R times as long.

    Raises:
        TypeError: ``x`` is no tensor.
        IndexError: ``x`` has no such dimension.
        ValueError: the length is odd.
        RuntimeError: the ranks' parts differ in shape or dtype, or another rank's call is wrong.

    Examples:
        >>> logits = fused_mha.parallel.unshard(logits, mesh["context"])  # (N, L / R, V) to (N, L, V)
    """
    found = group_of(group)
    size = dist.get_world_size(found)

    def check() -> str:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, not {type(x).__name__}")
        if (length := x.shape[dim]) % 2:
            raise ValueError(f"a rank's part must have an even length; got {length} in dimension {dim}")
        return f"x {tuple(x.shape)} {x.dtype}, dim={dim}"

    check_on_every_rank(found, x, "unshard", check)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=found)
    halves = {}
    for rank, part in enumerate(parts):
        halves.update(zip(chunks_of(rank, size), part.chunk(2, dim), strict=True))
    return torch.cat([halves[chunk] for chunk in range(2 * size)], dim)


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks, of 2 * size, that a rank holds."""
    return rank, 2 * size - 1 - rank


def positions_of(rank: int, size: int, length: int, device: torch.device) -> Tensor:
    """Where a rank's ``length`` tokens stand in the whole sequence, (length)."""
    chunk = length // 2
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in chunks_of(rank, size)])


class Block(NamedTuple):
    """Queries of a rank and keys of another that are attended to in one call, as first and last places in the parts."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    is_causal: bool  # top left
    first_query: int  # their places in the whole sequence, where both are of one chunk
    first_key: int


def blocks(rank: int, owner: int, size: int, length: int, is_causal: bool, by_chunk: bool) -> Iterator[Block]:
    """What a rank has to attend to of the keys of ``owner``, both with ``length`` tokens.

    Args:
        rank: whose queries.
        owner: whose keys.
        size: of the ring.
        length: of a rank's part.
        is_causal: hide later keys.
        by_chunk: make a block of each pair of chunks, not the fewest blocks.

    Yields:
        Blocks without a hidden key but for those of causality within one chunk, or within the rank's own part.
    """
    half = length // 2
    if by_chunk:
        for i, of_query in enumerate(chunks_of(rank, size)):
            for j, of_key in enumerate(chunks_of(owner, size)):
                if not is_causal or of_key <= of_query:
                    places = (i * half, (i + 1) * half), (j * half, (j + 1) * half)
                    yield Block(*places, is_causal and of_key == of_query, of_query * half, of_key * half)
        return
    queries = keys = (0, length)
    if is_causal and owner < rank:  # whose first chunk comes before both of ours, and whose second after both
        keys = (0, half)
    elif is_causal and owner > rank:  # both of whose chunks lie between ours
        queries = (half, length)
    yield Block(queries, keys, is_causal and owner == rank, 0, 0)

"""Groups of ranks: the one that a user names, what its ranks must agree on, and what they pass to each other.

Everything in `fused_mha.parallel` comes here for its group; `ring` and `context` communicate by it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None
_ROOM = 512  # bytes of what a rank says of its call: a mark, the check sum of all of it, and as much as has room
_SAID = 1 + 8  # where it begins


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group that is meant.

    Args:
        group: itself, a mesh of one dimension, or None for all ranks.

    Returns:
        The group, of which this rank is one.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        ValueError: a mesh of several dimensions, or this rank is not in the group.
        TypeError: something else.
    """
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group() first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            raise ValueError(
                f"group must be a mesh of one dimension; got one of {group.ndim}, {names}: take one of them, as in "
                f"mesh[{names[0] if names else 'name'!r}]"
            )
        return group.get_group()
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, dist.ProcessGroup):
        raise TypeError(
            f"group must be a process group, a mesh of one dimension or None; got {type(group).__name__}"
            if group is not dist.GroupMember.NON_GROUP_MEMBER
            else "group must be one that this rank is in; got the placeholder of a group of others"
        )
    if dist.get_rank(found) < 0:
        raise ValueError("group must be one that this rank is in")
    return found


def check_on_every_rank(group: dist.ProcessGroup, query: object, name: str, check: Callable[[], str]) -> None:
    """Let every rank check its own call, and raise on all of them if one fails or their calls differ.

    Without this a rank that raises, or that sends another size, would leave the others waiting. It costs one
    all-gather of half a kilobyte, of CPU memory where the group has a backend for that: no wait for a GPU then.

    Args:
        group: of the ranks.
        query: of the call, on the device of its tensors; anything, of which the check tells.
        name: of the function that is called.
        check: raises what is wrong with this rank's call, or describes what must be the same on every rank.

    Raises:
        RuntimeError: another rank's check failed, or the descriptions differ; this rank's own error is raised as it is.
    """
    error = None
    try:
        text = check()
    except Exception as raised:  # the other ranks have to hear of any
        error, text = raised, f"{type(raised).__name__}: {raised}"
    size = dist.get_world_size(group)
    has_cpu = "cpu" in dist.get_backend_config(group)
    device = query.device if isinstance(query, Tensor) and not has_cpu else torch.device("cpu")
    said = torch.zeros(_ROOM, dtype=torch.uint8)
    encoded = f"{'!' if error else '='}{zlib.crc32(text.encode()):08x}{text}".encode()[:_ROOM]
    said[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    heard = [torch.empty(_ROOM, dtype=torch.uint8, device=device) for _ in range(size)]
    dist.all_gather(heard, said.to(device), group=group)
    if error is not None:
        raise error
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in torch.stack(heard).tolist()]
    failed = [f"rank {rank}: {text[_SAID:]}" for rank, text in enumerate(texts) if text[0] == "!"]
    if failed:
        raise RuntimeError(f"{name} failed on another rank of the group\n  " + "\n  ".join(failed))
    if len(set(texts)) > 1:
        ranks_of: dict[str, list[str]] = {}
        for rank, text in enumerate(texts):
            ranks_of.setdefault(text, []).append(str(rank))
        said_by = (f"rank {', '.join(ranks)}: {text[_SAID:]}" for text, ranks in ranks_of.items())
        raise RuntimeError(f"{name} must be called alike on every rank of the group\n  " + "\n  ".join(said_by))


def described(tensors: Mapping[str, object], flags: Mapping[str, object]) -> str:
    """Shapes and dtypes of a call's tensors, and its flags, as `check_on_every_rank` compares them."""
    given = [f"{name} {_kind(x)}" for name, x in tensors.items() if x is not None]
    return ", ".join(given + [f"{name}={value}" for name, value in flags.items()])


def _kind(x: object) -> str:
    """Shape and dtype; of a nested tensor, whose sizes are not the same on every rank, its sequences' lengths."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    sizes = [len(sequence) for sequence in x.unbind()] if x.is_nested else tuple(x.shape)
    return f"{sizes} {str(x.dtype)[6:]}"


class Passing:
    """Tensors on their way: this rank's to the next one of the ring, and those of the rank before to this one."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self._sent = [x.contiguous() for x in tensors]  # alive until they have been sent
        self._received = [torch.empty_like(x) for x in self._sent]
        operations = [
            dist.P2POp(operation, x, peer, group)
            for operation, peer, side in ((dist.isend, after, self._sent), (dist.irecv, before, self._received))
            for x in side
        ]
        self._works = dist.batch_isend_irecv(operations)

    def received(self) -> list[Tensor]:
        """Wait for them; shapes and strides are those of what was sent."""
        for work in self._works:
            work.wait()
        return self._received

"""`KeyValueCache`: the keys and values of the tokens that a module has seen, for decoding.

Users make one for each module and give it to the module's forward; `steps` asks it for all keys of a call, and tells it
when the call has succeeded. A head's tokens lie side by side in one buffer, and every element's last token in the same
slot, so that attention is aligned at the bottom right for all: shorter elements have hidden slots before their first.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.activation import MultiheadAttention as TorchAttention

from fused_mha.core.modes import is_eager, is_exported

if TYPE_CHECKING:
    from fused_mha.module.multi_head_attention import MultiHeadAttention

LEAST_CAPACITY = 16


class Extended(NamedTuple):
    """What a call makes of a cache, of which the cache knows nothing before `KeyValueCache.commit`."""

    key: Tensor  # (N, S, H_kv, D), those that the call attends to, of which its own are the last
    value: Tensor  # (N, S, H_kv, D_v)
    hidden: Tensor | None  # (N, S), True = ignore
    buffers: tuple[Tensor, Tensor]  # which hold the same
    padding: Tensor | None  # (N, L), of the call's own keys
    new: int  # L, how many these are


class KeyValueCache:
    """The keys and values of one module's past tokens, to which each call with ``cache=`` adds its own.

    Keys are kept as they are attended to, after Q/K norm and rotation. A call attends to all tokens kept and its own,
    aligned at the bottom right: with ``is_causal=True``, tokens in chunks of any sizes give what all tokens give at
    once. What ``key_padding_mask`` hides in a call stays hidden; padding at the end of a call's tokens is not kept, so
    that the next token of each element follows its own last one. A call that fails leaves the cache as it was. Kept
    keys are detached: gradients reach those of the same call alone.

    Args:
        module: whose keys and values; a cache serves no other.
        batch_size: N; 1 for unbatched input.
        max_length: how many tokens each element may have, for which memory is taken at once. If None, memory grows by
            doubling.
        ring: keep those tokens alone that the module's ``window`` reaches back to, in memory for twice as many.
        dtype: of keys and values, that of the module's parameters if None; under autocast, its own.

    Raises:
        TypeError: ``module`` is no `MultiHeadAttention`.
        ValueError: ``batch_size`` or ``max_length`` is no positive number; ``ring`` with ``max_length``, or for a
            module whose window has no left side.

    Examples:
        >>> module = fused_mha.MultiHeadAttention(16, 4, batch_first=True).eval()
        >>> cache = fused_mha.KeyValueCache(module, batch_size=2, max_length=32)
        >>> tokens = torch.randn(2, 6, 16)
        >>> with torch.inference_mode():
        ...     for chunk in tokens.split([4, 1, 1], dim=1):
        ...         output, _ = module(chunk, chunk, chunk, need_weights=False, is_causal=True, cache=cache)
        >>> cache
        KeyValueCache(batch_size=2, length=6, capacity=32, dtype=torch.float32, device=cpu)
    """

    def __init__(
        self,
        module: MultiHeadAttention,
        batch_size: int,
        *,
        max_length: int | None = None,
        ring: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("max_length", max_length)):
            if (type(number) is not int or number < 1) and not (name == "max_length" and number is None):
                raise ValueError(f"{name} must be an int of at least 1; got {number!r}")
        H_kv, D, D_v = _head_sizes(module)
        window = None if module.options is None else module.options.window
        left = None if window is None else window[0]
        if ring and left is None:
            raise ValueError(f"ring=True needs a module with window=(left, right), left a number; got window={window}")
        if ring and max_length is not None:
            raise ValueError(f"ring=True has no end: max_length must be None; got {max_length}")
        self.max_length = max_length
        self._reach: int | None = left if ring else None  # how many tokens before its own a query sees
        self._module = weakref.ref(module)
        weight = module.k_proj_weight if module.in_proj_weight is None else module.in_proj_weight
        capacity = (max_length or 0) if self._reach is None else 2 * self._reach + 1
        with writable():
            self._keys, self._values = (
                _buffer(batch_size, capacity, H_kv, size, dtype or weight.dtype, weight.device) for size in (D, D_v)
            )
        self._hidden: Tensor | None = None  # (N, stored)
        self._behind: Tensor | None = None  # (N), how many tokens fewer than `length` an element has
        self._lost: Tensor | None = None  # (N), how many tokens of an element a ring had dropped when they last moved
        self._stored = 0  # slots in use
        self._dropped = 0  # tokens before these

    @property
    def batch_size(self) -> int:
        """N."""
        return self._keys.shape[0]

    @property
    def capacity(self) -> int:
        """For how many tokens there is memory."""
        return self._keys.shape[1]

    @property
    def length(self) -> int:
        """How many tokens the longest element has, with the padding at its left."""
        return self._dropped + self._stored

    @property
    def lengths(self) -> Tensor:
        """How many tokens each element has, with the padding at its left; (N), int64."""
        lengths = torch.full((self.batch_size,), self.length, device=self._keys.device)
        return lengths if self._behind is None else lengths - self._behind

    def __repr__(self) -> str:
        return (
            f"KeyValueCache(batch_size={self.batch_size}, length={self.length}, capacity={self.capacity}, "
            f"dtype={self._keys.dtype}, device={self._keys.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_module": None}  # it may be copied with its module; the next call binds it

    def __copy__(self) -> KeyValueCache:
        return self.__deepcopy__({})  # two caches in one memory would write over each other

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyValueCache:
        twin = KeyValueCache.__new__(KeyValueCache)
        vars(twin).update(self.__getstate__())
        with writable():
            for name, x in vars(self).items():
                if isinstance(x, Tensor):
                    setattr(twin, name, x.clone())
        memo[id(self)] = twin
        return twin

    def to(self, *args: Any, **kwargs: Any) -> KeyValueCache:
        """Move keys and values, in place as `nn.Module.to`.

        Args:
            *args: a device, a dtype, both, or a tensor that has both, as in `torch.Tensor.to`.
            **kwargs: of `torch.Tensor.to`.

        Returns:
            The cache itself.

        Raises:
            TypeError: something else, or a dtype that is not floating.
        """
        like = self._keys[:0].to(*args, **kwargs)
        if not like.is_floating_point():
            raise TypeError(f"dtype must be a floating one; got {like.dtype}")
        with writable():
            self._keys, self._values = (x.to(*args, **kwargs) for x in (self._keys, self._values))
        self._hidden, self._behind, self._lost = (
            None if x is None else x.to(like.device) for x in (self._hidden, self._behind, self._lost)
        )
        return self

    def reorder(self, indices: Tensor) -> None:
        """Take batch elements anew, as after a step of beam search: element n becomes what ``indices[n]`` was.

        Args:
            indices: (M), of an integer dtype; M, at least 1, is the new batch size.

        Raises:
            TypeError: no tensor.
            ValueError: of another rank or dtype, or an index that there is not.
        """
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be a Tensor, not {type(indices).__name__}: torch.tensor makes one of a list")
        if indices.dim() != 1 or indices.numel() == 0 or not _is_of_integers(indices):
            raise ValueError(f"indices must be (M) of an integer dtype; got {tuple(indices.shape)}, {indices.dtype}")
        if not bool(((indices >= 0) & (indices < self.batch_size)).all()):
            raise ValueError(f"indices must be in [0, batch_size = {self.batch_size}); got {indices.tolist()}")
        indices = indices.to(self._keys.device, torch.int64)
        with writable():
            self._keys, self._values = (
                x.transpose(1, 2).index_select(0, indices).transpose(1, 2) for x in (self._keys, self._values)
            )
        if self._hidden is not None:
            self._hidden = self._hidden.index_select(0, indices)
        if self._lost is not None:
            self._lost = self._lost.index_select(0, indices)
        if self._behind is not None:
            self._behind = self._behind.index_select(0, indices)
            self._leave_out(torch.zeros_like(self._behind))  # slots that no element has any more

    def truncate(self, length: int | Sequence[int] | Tensor) -> None:
        """Forget all tokens but the first ones, as after a draft that was refused; 0 forgets everything.

        Args:
            length: how many tokens to keep, of all elements or (N) of each; those that have fewer stay.

        Raises:
            ValueError: of another shape, negative, or so few that a ring has dropped what they would attend to.
        """
        moves = self._behind is not None or self._lost is not None or self._dropped
        if type(length) is int and length >= 0 and not moves:
            self._stored = min(self._stored, length)
            self._hidden = self._hidden[:, : self._stored] if self._hidden is not None and length else None
            return
        kept = torch.as_tensor(length, device=self._keys.device)
        if kept.shape not in ((), (self.batch_size,)) or not _is_of_integers(kept) or bool((kept < 0).any()):
            raise ValueError(f"length must be a count of tokens, or (N) = ({self.batch_size},) counts; got {length}")
        lengths = self.lengths
        kept = torch.minimum(lengths, kept)
        if self._reach:
            dropped = self._dropped_of_each()
            if bool(((kept > 0) & ((kept - self._reach).clamp(min=0) < dropped)).any()):
                raise ValueError(
                    f"length must keep what the window reaches back to, {self._reach} tokens, of which the ring has "
                    f"dropped the first {dropped.tolist()}; got {length}"
                )
        self._leave_out(lengths - kept)

    def is_of(self, module: MultiHeadAttention) -> bool:
        """Whether a module's calls may have this cache."""
        return self._module is None or self._module() is module

    def check(
        self, module: MultiHeadAttention, key: Tensor, value: Tensor, padding: Tensor | None, need_weights: bool
    ) -> None:
        """Raise unless a call's new keys and values, (N, L, H_kv, D) and (N, L, H_kv, D_v), belong here."""
        if is_exported() or torch.jit.is_tracing():
            raise ValueError(
                "cache must be None in a model that is exported or traced, which keeps nothing between calls; got a "
                "KeyValueCache. Let past keys and values be inputs of the model, for fused_mha.attention with "
                "causal_alignment='bottom_right'"
            )
        if not self.is_of(module):
            raise ValueError("cache must be one of this module, KeyValueCache(module, batch_size); got that of another")
        for name, x, kept in (("keys", key, self._keys), ("values", value, self._values)):
            if x.shape[2:] != kept.shape[2:]:
                raise ValueError(
                    f"cache must have {name} of this module's heads and sizes, {tuple(x.shape[2:])}; got those of a "
                    f"module with {tuple(kept.shape[2:])}"
                )
        if key.shape[0] != self.batch_size:
            raise ValueError(f"cache must have the call's batch size, {key.shape[0]}; got {self.batch_size}")
        if key.dtype != self._keys.dtype or key.device != self._keys.device:
            raise ValueError(
                f"cache must have the dtype and device of this call's keys, {key.dtype} on {key.device}; got "
                f"{self._keys.dtype} on {self._keys.device}. `KeyValueCache.to` changes both"
            )
        if self.max_length is not None and self.length + key.shape[1] > self.max_length:
            raise ValueError(
                f"cache has room for max_length = {self.max_length} tokens, and has {self.length}; got "
                f"{key.shape[1]} more"
            )
        if padding is not None and padding.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool beside a cache, which keeps it; got {padding.dtype}")
        before = self.length - self._kept_for(key.shape[1])
        if need_weights and before:
            raise ValueError(
                f"need_weights must be False once the ring has dropped keys, the first {before} for this call; got "
                "need_weights=True"
            )

    def positions(self, length: int) -> Tensor | None:
        """Those of the next tokens, (N, length); None where they are `length` and on for all elements."""
        if self._behind is None:
            return None
        return torch.arange(self.length, self.length + length, device=self._keys.device) - self._behind.unsqueeze(1)

    def extended(self, key: Tensor, value: Tensor, padding: Tensor | None) -> Extended:
        """What the cache and new tokens are together; changes nothing that an earlier call can be asked for.

        Args:
            key: (N, L, H_kv, D), which `check` has seen.
            value: (N, L, H_kv, D_v).
            padding: (N, L), bool, True = ignore, or None.

        Returns:
            What `commit` takes.
        """
        new = key.shape[1]
        kept = self._kept_for(new)
        buffers = self._with_room(kept, new)
        keys, values = (buffer[:, : kept + new] for buffer in buffers)
        keys[:, kept:], values[:, kept:] = key.detach(), value.detach()
        if torch.is_grad_enabled():  # what autograd saves, no later call may write to
            keys, values = torch.cat((keys[:, :kept], key), dim=1), torch.cat((values[:, :kept], value), dim=1)
        hidden = None
        if padding is not None or self._hidden is not None:
            N, device = self.batch_size, key.device
            none = [torch.zeros(N, length, dtype=torch.bool, device=device) for length in (kept, new)]
            of_kept = none[0] if self._hidden is None else self._hidden[:, self._stored - kept :]
            hidden = torch.cat((of_kept, none[1] if padding is None else padding), dim=1)
        return Extended(keys, values, hidden, buffers, padding, new)

    def commit(self, module: MultiHeadAttention, extended: Extended) -> None:
        """Keep the tokens of a call that has succeeded."""
        if self._module is None:
            self._module = weakref.ref(module)
        stored = extended.key.shape[1]
        self._dropped += self._stored + extended.new - stored
        self._keys, self._values = extended.buffers
        self._stored, self._hidden = stored, extended.hidden
        padding = extended.padding
        if padding is not None and not (is_eager() and not bool(padding[:, -1:].any())):
            self._leave_out(padding.flip(1).cumprod(1).sum(1))
        if self._reach is not None and self.capacity > 2 * self._reach + 1:  # that of a long chunk
            self._keep_last(self._reach)

    def _kept_for(self, new: int) -> int:
        """How many of the tokens in use stay beside new ones."""
        is_full = self._reach is not None and self._stored + new > self.capacity
        return min(self._stored, self._reach) if is_full and self._reach is not None else self._stored

    def _with_room(self, kept: int, new: int) -> tuple[Tensor, Tensor]:
        """Buffers whose first slots are the last ``kept`` in use, with room for ``new``: these, or larger copies."""
        buffers, needed = (self._keys, self._values), kept + new
        if kept == self._stored and needed <= self.capacity:
            return buffers
        capacity = max(needed, self.capacity if self._reach is not None else max(2 * self.capacity, LEAST_CAPACITY))
        return _copies(buffers, self._stored - kept, self._stored, capacity)

    def _keep_last(self, count: int) -> None:
        first = max(self._stored - count, 0)
        self._keys, self._values = _copies((self._keys, self._values), first, self._stored, 2 * count + 1)
        self._hidden = None if self._hidden is None else self._hidden[:, first:]
        self._dropped += first
        self._stored -= first

    def _dropped_of_each(self) -> Tensor:
        """How many of its first tokens each element has no more, (N)."""
        dropped = (self.lengths - self._stored).clamp(min=0)
        return dropped if self._lost is None else torch.maximum(dropped, self._lost)

    def _leave_out(self, last: Tensor) -> None:
        """Forget the last tokens of each element, (N), and move the others to the end."""
        if self._reach is not None:  # once they have moved, no slot says so any more
            self._lost = torch.minimum(self._dropped_of_each(), self.lengths - last)
        stored, behind = self._stored, last if self._behind is None else self._behind + last
        # So many slots are free at the end of all, or before the tokens of all once those are at the end.
        fewest = _number(torch.maximum(last.min(), behind.min() - self._dropped).clamp(max=stored))
        source = torch.arange(fewest, stored, device=last.device) - last.unsqueeze(1)  # (N, stored - fewest)
        before, source = source < 0, source.clamp(min=0)
        with torch.no_grad():
            for buffer in (self._keys, self._values):
                index = source[:, :, None, None].expand(-1, -1, *buffer.shape[2:])
                buffer[:, : stored - fewest] = buffer.gather(1, index)
        hidden = before if self._hidden is None else before | self._hidden.gather(1, source)
        behind = behind - fewest
        if self._reach is not None:
            before_all = _number(behind.min().clamp(max=self._dropped))  # what no element has had
            self._dropped -= before_all
            behind = behind - before_all
        self._stored, self._behind, self._hidden = stored - fewest, behind, hidden
        if is_eager():
            self._behind = behind if bool(behind.any()) else None
            self._hidden = hidden if bool(hidden.any()) else None


def _is_of_integers(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype != torch.bool


def _number(count: Tensor) -> int:
    """The count (); 0 of a tensor without a value, as those of tracers."""
    if not torch.compiler.is_dynamo_compiling():
        return int(count) if is_eager() else 0
    number = int(count)  # breaks the graph, but for fullgraph=True
    torch._check(number >= 0)
    return number


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """New tensors that can be written to later: those of inference mode could not be, outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _buffer(N: int, capacity: int, H_kv: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory (N, capacity, H_kv, D) in which the tokens of a head lie side by side, as attention reads them."""
    return torch.empty(N, H_kv, capacity, D, dtype=dtype, device=device).transpose(1, 2)


def _copies(buffers: tuple[Tensor, Tensor], first: int, last: int, capacity: int) -> tuple[Tensor, Tensor]:
    copies = []
    with writable():
        for buffer in buffers:
            N, _, H_kv, D = buffer.shape
            copy = _buffer(N, capacity, H_kv, D, buffer.dtype, buffer.device)
            copy[:, : last - first] = buffer[:, first:last]
            copies.append(copy)
    return copies[0], copies[1]


def _head_sizes(module: MultiHeadAttention) -> tuple[int, int, int]:
    if not isinstance(module, TorchAttention) or not hasattr(module, "options"):
        raise TypeError(f"module must be a fused_mha.MultiHeadAttention; got {type(module).__name__}")
    options = module.options
    if options is None:
        D = module.embed_dim // module.num_heads
        return module.num_heads, D, D
    return options.num_kv_heads, options.head_dim, options.value_head_dim

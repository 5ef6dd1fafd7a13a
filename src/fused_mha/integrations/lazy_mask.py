"""`LazyMask`, the mask that models of transformers get: a tensor whose entries are made when something asks for them.

`integrations.transformers_masks` makes it, and `integrations.transformers` finds it again in the calls of its attention
function. What a model does with it between the two, it does with the mask that it would get for `eager`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fused_mha.core.inputs import Window
from fused_mha.core.masks import outside_band


class Band(NamedTuple):
    """What a mask hides from L queries, the last of the first `visible` keys; it hides all later keys.

    Query p sees the keys from p - left to p + right, None being no limit: (None, 0) is causal.
    """

    limits: Window
    visible: int
    padding: Tensor | None  # (N, visible), bool, True = ignore

    def effective(self, L: int) -> Band:
        """The same without limits that hide nothing."""
        left, right = self.limits
        hides_early = left is not None and left < self.visible - 1  # from the last query
        hides_late = right is not None and right < L - 1  # from the first
        return self._replace(limits=(left if hides_early else None, right if hides_late else None))

    def hidden(self, L: int, S: int, device: torch.device) -> Tensor:
        """What is hidden, (N|1, 1, L, S)."""
        hidden = outside_band(L, self.visible, False, "bottom_right", self.limits, device)
        if hidden is None:
            hidden = torch.zeros(L, self.visible, dtype=torch.bool, device=device)
        hidden = hidden[None, None] if self.padding is None else hidden | self.padding[:, None, None]
        return torch.nn.functional.pad(hidden, (0, S - self.visible), value=True)


class LazyMask(Tensor):
    """A float mask (N, 1, L, S), 0 where a query attends and the dtype's lowest number where it does not.

    `hides` says the same in short, as a band or a bool tensor (True = ignore), until something could have changed the
    entries: a view was taken of them, or an operation in place was called. It is None then.
    """

    hides: Band | Tensor | None
    _entries: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int, int, int], hides: Band | Tensor, dtype: torch.dtype, device: torch.device
    ) -> LazyMask:
        """A mask without entries; `shape` is (N, 1, L, S)."""
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.hides, mask._entries = hides, None
        return mask

    def entries(self) -> Tensor:
        """The mask as an ordinary tensor."""
        if self._entries is None:
            hidden = self.hides
            if isinstance(hidden, Band):
                hidden = hidden.hidden(self.shape[2], self.shape[3], self.device)
            assert hidden is not None
            lowest = torch.finfo(self.dtype).min
            self._entries = torch.zeros(self.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, lowest)
        return self._entries

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operation, on the entries."""
        arguments = tree_map_only(LazyMask, LazyMask.entries, (args, kwargs or {}))
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            tree_map_only(LazyMask, LazyMask._forget, (args, kwargs))
        return func(*arguments[0], **arguments[1])

    def _forget(self) -> None:
        self.hides = None

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"LazyMask({tuple(self.shape)}, hides={self.hides})"

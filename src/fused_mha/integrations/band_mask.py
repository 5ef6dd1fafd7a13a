"""`BandMask`, what the models of transformers get for a mask where a few numbers say it all: a tensor without entries.

`integrations.transformers` makes it, hands it to the model, and finds it again in the calls of its attention function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fused_mha.core.inputs import Window
from fused_mha.core.masks import outside_band


class BandMask(Tensor):
    """A bool mask (N, 1, L, S), True = attend as in transformers, of a band of keys, padding, and keys of the future.

    A model may do with it what it does with any mask: its entries are made when something asks for them. What could
    change them, a view or an operation in place, ends that the fields say what the mask is: `is_band` is False then.

    The queries are the last L of the first `visible` keys, and no later key is visible. Query p sees the keys from
    p - left to p + right, None being no limit: (None, 0) is causal.
    """

    band: Window  # without limits that hide nothing
    visible: int
    padding: Tensor | None  # (N, visible), bool, True = ignore
    is_band: bool

    _entries: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int, int, int], band: Window, visible: int, padding: Tensor | None, device: torch.device
    ) -> BandMask:
        """A mask without memory; `shape` is (N, 1, L, S)."""
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        left, right = band
        hides_early = left is not None and left < visible - 1  # from the last query
        hides_late = right is not None and right < shape[2] - 1  # from the first
        mask.band = (left if hides_early else None, right if hides_late else None)
        mask.visible, mask.padding = visible, padding
        mask.is_band, mask._entries = True, None
        return mask

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key."""
        return self.band == (None, None) and self.padding is None and self.visible == self.shape[3]

    def entries(self) -> Tensor:
        """The mask as an ordinary tensor (N, 1, L, S), True = attend."""
        if self._entries is None:
            N, _, L, S = self.shape
            hidden = outside_band(L, self.visible, False, "bottom_right", self.band, self.device)
            if hidden is None:
                hidden = torch.zeros(L, self.visible, dtype=torch.bool, device=self.device)
            if self.padding is not None:
                hidden = hidden | self.padding[:, None, None]
            hidden = torch.nn.functional.pad(hidden, (0, S - self.visible), value=True)
            self._entries = hidden.logical_not().expand(N, 1, L, S).contiguous()  # to be changed in place by a model
        return self._entries

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operation, on the entries."""
        arguments = (args, kwargs or {})
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            tree_map_only(BandMask, BandMask._give_up, arguments)
        args, kwargs = tree_map_only(BandMask, BandMask.entries, arguments)
        return func(*args, **kwargs)

    def _give_up(self) -> None:
        self.is_band = False

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"BandMask({tuple(self.shape)}, band={self.band}, visible={self.visible}, padding={self.padding})"

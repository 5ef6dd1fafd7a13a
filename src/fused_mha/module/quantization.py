"""`QConfig`: the attribute of `MultiHeadAttention` by which `torch.ao.quantization` announces itself to a module."""

from __future__ import annotations

import warnings
from typing import Any


class QConfig:
    """A plain attribute ``qconfig`` that warns when it is set: torch.ao swaps modules of torch's exact class alone.

    It marks every module with it, and then leaves ours in float without a word.
    """

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        try:
            return vars(module)["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: Any, qconfig: Any) -> None:
        vars(module)["qconfig"] = qconfig
        if qconfig is not None:  # None is torch.ao's word for a module that stays in float
            warnings.warn(
                "torch.ao.quantization does not quantize fused_mha.MultiHeadAttention, but leaves it in float: call "
                "fused_mha.revert(model) first, or set the module's qconfig to None.",
                stacklevel=2,
            )

    def __delete__(self, module: Any) -> None:
        del vars(module)["qconfig"]

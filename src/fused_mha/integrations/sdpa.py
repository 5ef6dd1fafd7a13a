"""torch's `scaled_dot_product_attention` on the fused core: a function with its signature, and a switch for all calls.

Users call `scaled_dot_product_attention` in its place, or `serve_sdpa` to send every call in the process here;
`explain` asks `inputs_of`.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import ContextDecorator
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from fused_mha.backends.sdpa import torch_sdpa
from fused_mha.core import dispatch
from fused_mha.core.attention import attention
from fused_mha.core.inputs import AttentionInputs, check_attention
from fused_mha.core.modes import (
    as_autocast_casts,
    autocast_is_on,
    constant_for_dynamo,
    is_exported,
    is_recorded,
    onnx_export_is_active,
)

NAME = "scaled_dot_product_attention"
OURS = "fused_mha"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on the fused core, with torch's arguments and meanings.

    As there, and unlike `fused_mha.attention`, heads come before the length, and True in a mask means *attend*. Calls
    that the core does not serve, or serves no better, are torch's: those that torch refuses, so that errors are torch's
    too, tensors that are not 3-D or 4-D, and what `torch.nn.attention.sdpa_kernel` gives to one of torch's kernels.

    N batch, H query heads, H_kv key and value heads, L query length, S key length, D head size.

    Args:
        query: (N, H, L, D) or (N, L, D).
        key: (N, H_kv, S, D) or (N, S, D).
        value: (N, H_kv, S, D_v) or (N, S, D_v).
        attn_mask: broadcastable to (N, H, L, S), bool (True = attend) or of query's dtype (added to the scores).
        dropout_p: probability of dropping a weight; always applied. Other draws than torch's.
        is_causal: hide the future, aligned top-left; not together with ``attn_mask``.
        scale: factor of the scores; 1 / sqrt(D) if None.
        enable_gqa: H may be a multiple of H_kv.

    Returns:
        (N, H, L, D_v) or (N, L, D_v), in query's dtype. A query that sees no key gets zeros.

    Raises:
        RuntimeError: as torch's.

    Examples:
        >>> query, key, value = (torch.randn(2, 4, 5, 8) for _ in range(3))
        >>> fused_mha.scaled_dot_product_attention(query, key, value, is_causal=True).shape
        torch.Size([2, 4, 5, 8])

    Source:
        `torch.nn.functional.scaled_dot_product_attention`.
    """
    result = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(result, Tensor):
        return result
    return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _attend(query: Tensor, *arguments: Any) -> Tensor | str:
    """The result of the fused core, or why torch serves the call."""
    inputs = inputs_of(query, *arguments)
    if isinstance(inputs, str):
        return inputs
    if inputs.query.device.type == "cpu":
        back_end = dispatch.choose(inputs)
        if back_end.name not in ("cpu", dispatch.forced()) and not onnx_export_is_active():
            return f"the back end {back_end.name} would serve it"
        result = dispatch.run(back_end, inputs)
    else:  # where `attention` has plans for eager calls, torch's kernels among them
        masks = {"attn_mask": inputs.attn_mask, "is_causal": inputs.is_causal}
        result = attention(*inputs[:3], **masks, dropout_p=inputs.dropout_p, scale=inputs.scale)
    output = result.output.transpose(1, 2) if query.dim() == 4 else result.output.squeeze(2)
    # As torch's is, so that a view that a model takes of it is one.
    of_mask = inputs.attn_mask is not None and inputs.attn_mask.requires_grad
    return output.contiguous() if query.is_contiguous() or inputs.dropout_p > 0.0 or of_mask else output


def inputs_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionInputs | str:
    """A call of torch's function as the core takes it, or why torch serves it: torch refuses it, or knows more."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return "query, key and value are not all tensors"
    if type(is_causal) is not bool or type(enable_gqa) is not bool or not isinstance(dropout_p, (int, float)):
        return "a flag is no bool, or dropout_p no number"
    # Not in ONNX: in old opsets, what torch's operator is there is wrong on rows that see nothing.
    if has_torch_function((query, key, value, attn_mask)) and not onnx_export_is_active():
        return "a subclass of torch.Tensor or a mode has its own way"
    if is_exported() and not onnx_export_is_active():
        return "an exported program has torch's operator"
    dims = query.dim()
    if dims not in (3, 4) or key.dim() != dims or value.dim() != dims:
        return "query, key and value are not all 3-D or all 4-D"
    if query.is_nested or key.is_nested or value.is_nested or 0 in (query.numel(), key.numel(), value.numel()):
        return "a tensor is nested or empty"
    if (reason := left_to_torch(query, key, value)) is not None:
        return reason
    if autocast_is_on(query.device.type):
        query, key, value = map(as_autocast_casts, (query, key, value))
        attn_mask = as_autocast_casts(attn_mask) if isinstance(attn_mask, Tensor) else attn_mask
    if isinstance(attn_mask, Tensor) and attn_mask.dtype not in (torch.bool, query.dtype):
        return "attn_mask has another dtype than query"
    if dims == 4:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    else:  # one head
        query, key, value = query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if not enable_gqa and key.shape[2] != query.shape[2]:
        return "query and key have other numbers of heads, without enable_gqa"
    is_matrix = attn_mask is None or (isinstance(attn_mask, Tensor) and 2 <= attn_mask.dim() <= dims)
    if not is_matrix or (is_causal and attn_mask is not None):
        return "attn_mask stands beside is_causal, is no tensor, or has too few or too many dimensions"
    if not _all_of_torchs_kernels_are_enabled():
        return "torch.nn.attention.sdpa_kernel chooses among torch's kernels"
    try:
        if attn_mask is not None:
            attn_mask = _mask_of(attn_mask, dims, key.shape[1])
        return check_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
        )
    except (RuntimeError, ValueError):  # torch refuses it too, or broadcasts
        return "the sizes, dtypes or devices differ"


def left_to_torch(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a call on the CPU that the core could serve ends sooner in torch; never in ONNX or by a forced back end."""
    if not query.is_cpu or dispatch.forced() is not None or onnx_export_is_active():
        return None
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if is_half and is_recorded(query, key, value):  # torch's backward takes 1.1 to 10 times as long
        return None
    if not torch.compiler.is_compiling() and query.numel() * key.shape[-2] <= _SMALL:  # sizes may be symbols there
        return "a call so small takes torch less time"
    if is_half and query.shape[-2] < _FEW:
        return "few queries in a half type take torch less time"
    return None


# Torch's own overhead is 5 us and ours 25. So torch ends sooner with at most so many multiply-adds in one of the two
# products, and in a half type with fewer queries than this: on an Intel Xeon with AMX, by benchmarks/run.py sdpa.
_SMALL, _FEW = 2**23, 8


def _mask_of(attn_mask: Tensor, dims: int, S: int) -> Tensor:
    """Torch's mask as the core's, (N|1, H|1, L|1, S) and True where a key is ignored."""
    if dims == attn_mask.dim() == 3:
        attn_mask = attn_mask[:, None]
    while attn_mask.dim() < 4:
        attn_mask = attn_mask[None]
    if attn_mask.dtype == torch.bool:
        for dim, stride in enumerate(attn_mask.stride()):  # what was expanded is negated once
            if stride == 0:
                attn_mask = attn_mask.narrow(dim, 0, 1)
        attn_mask = attn_mask.logical_not()
    return attn_mask.expand(*attn_mask.shape[:3], S)


@constant_for_dynamo
def _all_of_torchs_kernels_are_enabled() -> bool:
    kernels = torch.backends.cuda  # of the CPU too
    return kernels.flash_sdp_enabled() and kernels.mem_efficient_sdp_enabled() and kernels.math_sdp_enabled()


class ServedCalls(NamedTuple):
    """What `serve_sdpa` has done with calls so far; `print` it. `left` counts torch's by the reason.

    Examples:
        >>> print(fused_mha.ServedCalls(served=12, left={"a small call": 3}))
        served 12, left to torch 3
                 3  a small call
    """

    served: int
    left: dict[str, int]

    def __str__(self) -> str:
        lines = [f"served {self.served}, left to torch {sum(self.left.values())}"]
        lines += [f"  {count:>8}  {reason}" for reason, count in sorted(self.left.items(), key=lambda item: -item[1])]
        return "\n".join(lines)


class serve_sdpa(ContextDecorator):  # noqa: N801  (as torch.no_grad)
    """Send the process's calls of `torch.nn.functional.scaled_dot_product_attention` to the fused core.

    A context manager and a decorator; `on` and `off` switch it for good. Calls that the core does not serve, or serves
    no better, stay torch's, as for `fused_mha.scaled_dot_product_attention`; on other devices than the CPU all do. The
    function is replaced in `torch.nn.functional` and in all modules that have imported it under its own name. So code
    that runs under `torch.compile` is compiled once more, for as long as the core serves. Another thread's calls are
    served too while one thread is inside. A forward that is recomputed in the backward (activation checkpointing) needs
    the context there too, or `on`.

    Examples:
        >>> query = torch.randn(2, 8, 256, 64)
        >>> with fused_mha.serve_sdpa():  # around the forward of a model
        ...     output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        >>> print(fused_mha.serve_sdpa.report())
        served 1, left to torch 0
    """

    _lock = threading.RLock()
    _inside = 0
    _is_on = False
    _serves = False  # the one thing that a compiled call asks
    _counts: ClassVar[Counter[str]] = Counter()

    def __enter__(self) -> None:
        with self._lock:
            serve_sdpa._inside += 1
            self._update()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            serve_sdpa._inside = max(serve_sdpa._inside - 1, 0)
            self._update()

    @classmethod
    def on(cls) -> None:
        """Serve from here on, in all threads, until `off`."""
        with cls._lock:
            cls._is_on = True
            cls._update()

    @classmethod
    def off(cls) -> None:
        """Serve inside ``with`` blocks alone."""
        with cls._lock:
            cls._is_on = False
            cls._update()

    @classmethod
    def report(cls, *, clear: bool = False) -> ServedCalls:
        """What came of the calls so far.

        Args:
            clear: count from zero again.

        Returns:
            How many eager calls the core has served and, by reason, how many torch. Calls of compiled code are not
            counted.
        """
        with cls._lock:
            counts = dict(cls._counts)
            if clear:
                cls._counts.clear()
        return ServedCalls(counts.pop(OURS, 0), counts)

    @classmethod
    def _update(cls) -> None:
        """Put the function that belongs there into every module that has the other."""
        serves = cls._is_on or cls._inside > 0
        if serves is cls._serves:
            return
        serve_sdpa._serves = serves
        wanted, other = (_serving, torch_sdpa) if serves else (torch_sdpa, _serving)
        for name, module in list(sys.modules.items()):
            is_known_to_torch = name.startswith("torch._")  # torch._C has the function for all of torch's own code
            if not is_known_to_torch and isinstance(module, ModuleType) and vars(module).get(NAME) is other:
                setattr(module, NAME, wanted)

    @classmethod
    def _count(cls, result: Tensor | str) -> None:
        with cls._lock:
            cls._counts[result if isinstance(result, str) else OURS] += 1


def _serving(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What stands in the place of torch's function, and serves while `serve_sdpa` does."""
    result: Tensor | str = "on another device than the CPU"
    if not serve_sdpa._serves:  # a module that took this function when it was imported
        result = "outside of serve_sdpa"
    elif not isinstance(query, Tensor) or query.is_cpu:
        result = _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not torch.compiler.is_compiling():
        serve_sdpa._count(result)
    if isinstance(result, Tensor):
        return result
    return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


# torch.jit.script takes these for the operator that torch's function is. Not public.
_register_builtin: Any = getattr(getattr(torch.jit, "_builtins", None), "_register_builtin", None)
if _register_builtin is not None:
    for function in (scaled_dot_product_attention, _serving):
        _register_builtin(function, f"aten::{NAME}")

FUNCTIONS = (scaled_dot_product_attention, _serving, torch_sdpa)


def explain(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> dispatch.Explanation:
    """Which back end serves a call of `scaled_dot_product_attention`; `fused_mha.explain` calls it."""
    inputs = inputs_of(query, key, value, **arguments)
    if not isinstance(inputs, str):
        return dispatch.explain_inputs(inputs)
    left = {"cpu": inputs} if inputs == left_to_torch(query, key, value) else {}
    return dispatch.Explanation("sdpa", {"cpu": [] if left else [inputs]}, [], dispatch.forced(), left=left)

"""`warm_up`: compiles the kernels of calls that are yet to come, for servers that may not stall at the first."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_mha.backends import triton
from fused_mha.core import plans
from fused_mha.core.attention import attention
from fused_mha.core.varlen import varlen_attention
from fused_mha.module.multi_head_attention import MultiHeadAttention

HeadSize = int | tuple[int, int]
_BY_DTYPE = ("attn_mask", "key_padding_mask", "sinks", "alibi_slopes")
_FLAGS = ("is_causal", "dropout_p", "softcap", "need_weights", "average_attn_weights", "weights_of_heads", "return_lse")
_FLAGS += ("add_zero_attn",)
_OPTIONS = (*_BY_DTYPE, *_FLAGS, "bias_kv", "grouped", "packed")
_NOT_OF_PACKED = ("attn_mask", "need_weights", "average_attn_weights", "weights_of_heads", "add_zero_attn", "bias_kv")
_HEADS = 8  # of head sizes that are given without a number
CALLS: tuple[Mapping[str, object], ...] = (
    {"key_padding_mask": torch.bool},
    {"need_weights": True},
    {"key_padding_mask": torch.bool, "need_weights": True},
)


class _Heads(NamedTuple):
    """Their sizes and numbers, and what a module adds to each call."""

    D: int
    D_v: int
    H: int
    dtype: torch.dtype
    device: torch.device
    flags: tuple[tuple[str, object], ...] = ()


def warm_up(
    target: nn.Module | Iterable[HeadSize],
    *,
    calls: Sequence[Mapping[str, object]] = CALLS,
    lengths: Sequence[int] = (128,),
    batch_size: int = 1,
    backward: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cuda",
) -> int:
    """Compile ahead what calls of attention on a GPU will run, with a line to stderr for each.

    Triton compiles a kernel at the first call that needs it, for seconds, and keeps it on disk for later processes.
    One variant serves all lengths, batches and numbers of heads. Only an attn_mask and weights have others: for rows
    that are no multiples of 16 bytes, and a mask for calls of 2^24 scores or more, where it is searched for tiles to
    skip. Give ``lengths`` and ``batch_size`` of each kind. Calls that go to torch's own kernels compile nothing. Under
    `torch.autocast`, calls are cast as the model's: enter it if the model runs so. torch's generators stay as they are.

    Args:
        target: a model, for every `MultiHeadAttention` in it as it is now (dtype, device, training mode); or head
            sizes, each D or (D, D_v).
        calls: what is given to each call beside query, key and value: the dtypes of ``attn_mask``,
            ``key_padding_mask``, ``sinks`` and ``alibi_slopes`` (slopes that learn take one kernel more), and of
            `attention`'s flags ``is_causal``, ``dropout_p``, ``softcap`` (one serves all), ``need_weights``,
            ``average_attn_weights``, ``weights_of_heads`` (one choice serves all), ``return_lse``, ``add_zero_attn``;
            ``bias_kv=True`` gives both biases, ``grouped=True`` two query heads to each key head, and ``packed=True``
            makes a call of `varlen_attention`, as nested input of a module does.
        lengths: L = S of calls that are made of each.
        batch_size: N of these.
        backward: compile the gradients of a loss of the output too; if None, those of a model in training mode.
        dtype: of head sizes; a model has its own.
        device: of head sizes; a model has its own.

    Returns:
        How many calls were made; 0 where there is no CUDA core.

    Raises:
        ValueError: a model without `MultiHeadAttention` or on another device than a GPU, head sizes without a dtype, an
            argument of ``calls`` that is not known, or that packed sequences have not.

    Examples:
        >>> model = nn.TransformerEncoderLayer(512, 8, batch_first=True)
        >>> fused_mha.convert(model)  # doctest: +SKIP
        >>> fused_mha.warm_up(model.cuda().eval(), calls=[{"key_padding_mask": torch.bool}])  # doctest: +SKIP
        fused_mha.warm_up: 1 of 1: heads of 64, float32, length 128, key_padding_mask=bool: 3.1 s
        1
    """
    for call in calls:
        for name, value in call.items():
            if name not in _OPTIONS:
                raise ValueError(f"calls must name {', '.join(_OPTIONS)}; got {name!r}")
            if name in _BY_DTYPE and not isinstance(value, torch.dtype):
                raise ValueError(f"calls must give {name} by its dtype, such as torch.bool; got {value!r}")
    if isinstance(target, nn.Module):
        heads = _heads_of(target)
        backward = target.training if backward is None else backward
    elif dtype is None:
        raise ValueError("dtype must be given with head sizes; got None")
    else:
        pairs = [(size, size) if isinstance(size, int) else size for size in target]
        heads = [_Heads(D, D_v, _HEADS, dtype, torch.device(device)) for D, D_v in pairs]
    if (reason := _reason_against()) is not None:
        _say(f"nothing to compile: {reason}")
        return 0
    if elsewhere := {of.device.type for of in heads} - {plans.DEVICE}:
        raise ValueError(f"target must be on a GPU; got {', '.join(sorted(elsewhere))}")
    every = [
        (of, tuple({**call, **dict(of.flags)}.items()), length) for of in heads for call in calls for length in lengths
    ]
    jobs = list(dict.fromkeys(every))  # a model has many layers of one kind
    for _, call, _ in jobs:
        given = dict(call)
        if given.get("packed") and (others := [name for name in given if name in _NOT_OF_PACKED]):
            raise ValueError(f"calls must not give packed beside {', '.join(others)}")
    for i, (of, call, length) in enumerate(jobs, 1):
        start = time.perf_counter()
        generators = [of.device] if of.device.type == "cuda" else []  # beside the CPU's
        with torch.random.fork_rng(generators), torch.inference_mode(False):
            _call(of, dict(call), batch_size, length, bool(backward))
        named = ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in call)
        size = of.D if of.D_v == of.D else f"{of.D} and {of.D_v}"
        what = f"heads of {size}, {str(of.dtype).removeprefix('torch.')}, length {length}, {named or 'no options'}"
        _say(f"{i} of {len(jobs)}: {what}: {time.perf_counter() - start:.1f} s")
    return len(jobs)


def _heads_of(model: nn.Module) -> list[_Heads]:
    found = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if not found:
        raise ValueError(f"target must hold a fused_mha.MultiHeadAttention; {type(model).__name__} has none")
    heads = []
    for module in found:
        flags: dict[str, object] = {"add_zero_attn": True} if module.add_zero_attn else {}
        if module.bias_k is not None:
            flags["bias_kv"] = True
        if module.training and module.dropout:
            flags["dropout_p"] = module.dropout
        weight = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
        D = D_v = module.embed_dim // module.num_heads
        H, options = module.num_heads, module.options
        if options is not None:
            D, D_v, H = options.head_dim, options.value_head_dim, options.num_kv_heads
            flags |= {"grouped": True} if module.num_heads != H else {}
            flags |= {"window": options.window} if options.window is not None else {}
            flags |= {"softcap": options.softcap} if options.softcap is not None else {}
            flags |= {"sinks": weight.dtype} if options.sinks else {}
            flags |= {"alibi_slopes": torch.float32} if options.alibi_slopes is not None else {}
        heads.append(_Heads(D, D_v, H, weight.dtype, weight.device, tuple(flags.items())))
    return heads


def _reason_against() -> str | None:
    if not triton.BACKEND.capability.is_installed:
        return "Triton is not installed"
    return None if plans.DEVICE != "cuda" or torch.cuda.is_available() else "there is no GPU"


def _call(of: _Heads, call: dict[str, Any], N: int, length: int, backward: bool) -> None:
    """A call of that kind, of zeros."""

    def zeros(*shape: int, dtype: torch.dtype = of.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=of.device)

    query_heads = 2 * of.H if call.pop("grouped", False) else of.H
    shapes = {"attn_mask": (length, length), "key_padding_mask": (N, length)}
    shapes |= dict.fromkeys(("sinks", "alibi_slopes"), (query_heads,))
    given = {name: zeros(*shapes[name], dtype=x) if name in shapes else x for name, x in call.items()}
    if given.pop("bias_kv", False):
        given |= {"bias_k": zeros(of.H, of.D), "bias_v": zeros(of.H, of.D_v)}
    sizes = ((query_heads, of.D), (of.H, of.D), (of.H, of.D_v))
    inputs = [zeros(N, length, *size).requires_grad_(backward) for size in sizes]
    is_packed = given.pop("packed", False)
    with torch.set_grad_enabled(backward):
        output = _packed(inputs, given) if is_packed else attention(*inputs, **given).output
        if backward:
            torch.autograd.grad(output, inputs, torch.zeros_like(output))
    if is_packed:
        return
    if "key_padding_mask" in given and of.D_v == of.D:  # what a module launches beside these
        E = of.H * of.D
        module = MultiHeadAttention(E, of.H, batch_first=True, device=of.device, dtype=of.dtype)
        with torch.no_grad():
            module(*(zeros(N, length, E),) * 3, key_padding_mask=given["key_padding_mask"], need_weights=False)


def _packed(inputs: list[Tensor], given: dict[str, Any]) -> Tensor:
    """The same batch without padding between its elements."""
    N, length = inputs[0].shape[:2]
    offsets = torch.arange(0, N * length + 1, length, device=inputs[0].device)
    if "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"].flatten()
    query, key, value = (x.flatten(0, 1) for x in inputs)
    return varlen_attention(query, key, value, offsets, offsets, **given).output


def _say(text: str) -> None:
    print(f"fused_mha.warm_up: {text}", file=sys.stderr, flush=True)

"""What `bench_cuda` times beside ours and torch's kernels, and is no part of the ratio.

FlexAttention, and torch's kernels with a float mask as they would have to be called to serve it as ours do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_mha.core import masks

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (N, L, H, D), giving the same
SECONDS = 40.0  # for all that FlexAttention compiles in a run
MOST_CASES = 1 << 10  # each is compiled anew, for its mask; Dynamo's own limit is eight
_compiled: list[float] = []  # seconds of each


def flex_attention(
    name: str, key_padding_mask: Tensor, is_causal: bool, length: int, inputs: Sequence[Tensor]
) -> Attention | None:
    """Compiled FlexAttention with a block mask that is made here; None, with a line that says why, where it fails.

    Args:
        name: of the case.
        key_padding_mask: (N, S), True = ignore.
        is_causal: whether the future is hidden too.
        length: of the queries.
        inputs: a query, key and value, of which the first call is compiled, with its gradient if they need one.

    Returns:
        What is called as our attention.
    """
    if sum(_compiled) > SECONDS:
        return _skipped(name, f"its compilations took {sum(_compiled):.0f} s")
    start = time.perf_counter()
    try:
        attention = _flex_attention(key_padding_mask, is_causal, length)
        with torch._dynamo.config.patch(recompile_limit=MOST_CASES):
            output = attention(*inputs)
        if output.requires_grad:
            torch.autograd.grad(output.sum(), list(inputs))
    except Exception as error:  # a machine may have no compiler for it, or a torch that cannot: the others are timed
        return _skipped(name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    finally:
        _compiled.append(time.perf_counter() - start)
    return attention


def _flex_attention(key_padding_mask: Tensor, is_causal: bool, length: int) -> Attention:
    # Here, since an installation may have none.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415

    visible = key_padding_mask.logical_not()

    def is_visible(n: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible[n, j] & (i >= j) if is_causal else visible[n, j]

    N, S = key_padding_mask.shape
    block_mask = create_block_mask(is_visible, N, None, length, S, device=key_padding_mask.device)
    attend: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return attend(*heads, block_mask=block_mask).transpose(1, 2)

    return attention


def _skipped(name: str, reason: str) -> None:
    print(f"skipped: FlexAttention beside {name}: {reason}", flush=True)


def cleaned(attn_mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA with a float mask (N|1, H|1, L, S), and zeros in rows that see nothing, as the back end `sdpa` gives them.

    The rule "float attn_mask" of `fused_mha.backends.delegation` stands on what this takes.
    """
    bias, empty = masks.without_empty_rows(attn_mask)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, bias).masked_fill(empty, 0.0).transpose(1, 2)

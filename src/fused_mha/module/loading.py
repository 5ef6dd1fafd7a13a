"""Checkpoints: what a module with options takes from torch's, what a failed load leaves, and pooled key heads.

`MultiHeadAttention.load_state_dict` and its loading hook call this; users call `pool_key_heads`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fused_mha.module.options import OPTIONAL_NAMES, OWN_NAMES

# Of the state_dict of a module with options; without them it is torch's, and so of torch's version.
VERSION = 2


@contextlib.contextmanager
def all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Put every parameter and buffer of a module back if what is done to them fails."""
    holders: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for child in module.modules() for held in (child._parameters, child._buffers)
    ]
    tensors = [tensor for _, before in holders for tensor in before.values() if tensor is not None]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if not is_lazy(tensor)]
    try:
        yield
    except Exception:
        for held, before in holders:
            held.update(before)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def may_lack(state_dict: Mapping[str, Any], prefix: str, version: int | None) -> frozenset[str]:
    """The keys that a state_dict of torch's module, or of ours without options, has no reason to have.

    Args:
        state_dict: of any module that holds the attention.
        prefix: of the attention's names in it.
        version: of the attention in it, or None.

    Returns:
        Names with their prefix; none for a state_dict of a module with options.
    """
    if (version is not None and version >= VERSION) or any(prefix + name in state_dict for name in OWN_NAMES):
        return frozenset()
    return frozenset(prefix + name for name in OPTIONAL_NAMES)


def pool_key_heads(
    state_dict: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, *, prefix: str = ""
) -> dict[str, Tensor]:
    """A checkpoint of `torch.nn.MultiheadAttention` for a module with fewer key and value heads: means of groups.

    Key head g of the result is the mean of the ``num_heads / num_kv_heads`` heads whose queries will read it; so are
    its value head, their biases, and ``bias_k`` and ``bias_v``. Queries and the output projection stay.

    Args:
        state_dict: of torch's module, or of a model that holds it.
        num_heads: H of the module that the checkpoint is of.
        num_kv_heads: H_kv of the module that it is for; divides ``num_heads``.
        prefix: of the module's names in ``state_dict``, such as ``"layers.0.self_attn."``.

    Returns:
        A new dict, in which the names that are not of key and value hold the given tensors.

    Raises:
        ValueError: ``num_kv_heads`` does not divide ``num_heads``, or ``num_heads`` the rows of a tensor.
        KeyError: there are no projections of that prefix.

    Examples:
        >>> state_dict = torch.nn.MultiheadAttention(64, 8).state_dict()
        >>> module = fused_mha.MultiHeadAttention(64, 8, num_kv_heads=2)
        >>> module.load_state_dict(fused_mha.pool_key_heads(state_dict, num_heads=8, num_kv_heads=2))
        <All keys matched successfully>

    Source:
        Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
        (arXiv 2305.13245), section 2.1.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}; got {num_kv_heads}")

    def pooled(name: str, x: Tensor, dim: int) -> Tensor:
        if x.shape[dim] % num_heads:
            raise ValueError(f"num_heads must divide dimension {dim} of {name}, {tuple(x.shape)}; got {num_heads}")
        heads = x.unflatten(dim, (num_kv_heads, num_heads // num_kv_heads, -1))
        return heads.mean(dim % x.dim() + 1).flatten(dim % x.dim(), dim % x.dim() + 1)

    result = dict(state_dict)
    for name in ("in_proj_weight", "in_proj_bias"):
        if (x := result.get(prefix + name)) is not None:
            query, key, value = x.chunk(3)
            result[prefix + name] = torch.cat((query, pooled(prefix + name, key, 0), pooled(prefix + name, value, 0)))
    for name, dim in (("k_proj_weight", 0), ("v_proj_weight", 0), ("bias_k", -1), ("bias_v", -1)):
        if (x := result.get(prefix + name)) is not None:
            result[prefix + name] = pooled(prefix + name, x, dim)
    if not any(prefix + name in result for name in ("in_proj_weight", "k_proj_weight")):
        raise KeyError(f"state_dict must have {prefix}in_proj_weight or {prefix}k_proj_weight; got {[*state_dict]}")
    return result

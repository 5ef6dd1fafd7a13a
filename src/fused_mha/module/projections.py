"""The linear maps around the attention core: embeddings to split heads, and heads back to embeddings.

`MultiHeadAttention.forward` calls these. All are differentiable PyTorch on the parameters as they are at the call.
`hidden` marks the rows of key and value that no query may see: 0 * NaN = NaN would reach the gradients of the weights,
so zeros or finite numbers take their place. Back ends that read hidden keys are given zeros by `dispatch.run`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fused_mha.core import masks, modes
from fused_mha.module.arguments import ModuleArguments
from fused_mha.module.linear import linear

Rows = tuple[int, int, int]


def packed_in_projection(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Project by one packed weight, with as few matrix products as the identities of the inputs allow.

    Args:
        query: (..., E).
        key: (..., E).
        value: (..., E).
        weight: (3E, E), the rows of query, key and value in this order.
        bias: (3E), or None.
        rows: how many rows of the weight each of the three has; E if None.

    Returns:
        The three projections, as views of one tensor where one product made them.
    """
    E = weight.shape[1]
    of_query, of_key, of_value = rows or (E, E, E)
    if query is key and key is value:
        q, k, v = _project(query, weight, bias).split([of_query, of_key, of_value], dim=-1)
        return q, k, v
    if key is value:
        w_q, w_kv = weight.split([of_query, of_key + of_value])
        b_q, b_kv = bias.split([of_query, of_key + of_value]) if bias is not None else (None, None)
        k, v = _project(key, w_kv, b_kv).split([of_key, of_value], dim=-1)
        return _project(query, w_q, b_q), k, v
    w_q, w_k, w_v = weight.split([of_query, of_key, of_value])
    return separate_in_projection(query, key, value, w_q, w_k, w_v, bias)


def separate_in_projection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project by three weights.

    Args:
        query: (..., E).
        key: (..., kdim).
        value: (..., vdim).
        w_q: (E, E), or of other rows, as the other two.
        w_k: (E, kdim).
        w_v: (E, vdim).
        bias: (3E), packed in the order query, key, value, or None.

    Returns:
        The three projections, each of as many features as its weight has rows.
    """
    b_q = b_k = b_v = None
    if bias is not None:
        b_q, b_k, b_v = bias.split([w_q.shape[0], w_k.shape[0], w_v.shape[0]])
    return _project(query, w_q, b_q), _project(key, w_k, b_k), _project(value, w_v, b_v)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`; a bias of another dtype is added in the wider one, as torch's module does with ``batch_first``."""
    if bias is None or bias.dtype == weight.dtype:
        return linear(x, weight, bias)
    product = linear(x, weight, None)
    return (product + bias).to(product.dtype)


def recordable(arguments: ModuleArguments) -> ModuleArguments:
    """Copies of query, key and value from `torch.inference_mode`, which autograd can't save; what is one stays one."""
    query, key, value = arguments[:3]
    if not (query.is_inference() or key.is_inference() or value.is_inference()):
        return arguments
    copies = {id(x): modes.recordable(x) for x in (query, key, value)}
    return arguments._replace(query=copies[id(query)], key=copies[id(key)], value=copies[id(value)])


def without_hidden_keys(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros, or finite numbers, in the rows of key and value that no query may see; what is one tensor stays one.

    Args:
        query: (..., E).
        key: (..., kdim).
        value: (..., vdim).
        hidden: (..., 1), bool, True = never read; of key's and value's shape.

    Returns:
        The three.
    """
    if query is key and key is value:
        x = masks.finite_where(hidden, query)
        return x, x, x
    without = key.masked_fill(hidden, 0.0)
    return query, without, without if value is key else value.masked_fill(hidden, 0.0)


def out_projection(x: Tensor, out_proj: nn.Module) -> Tensor:
    """Apply the module's ``out_proj``: by `linear` on its parameters, unless it is or does anything else.

    Args:
        x: (..., E), merged heads.
        out_proj: a linear layer, or what a user has put in its place.

    Returns:
        What ``out_proj(x)`` returns.
    """
    if isinstance(out_proj, nn.Linear) and is_stock(out_proj):
        return linear(x, out_proj.weight, out_proj.bias)
    return out_proj(x)


def is_stock(out_proj: nn.Linear) -> bool:
    """Whether calling it is no more than `linear` on its parameters: it is torch's own, with no hook."""
    own = out_proj.__dict__
    return (
        type(out_proj) in _LINEAR_TYPES
        and "forward" not in own
        and "weight" in own["_parameters"]
        and not (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )
        and not (
            module._global_forward_hooks
            or module._global_forward_pre_hooks
            or module._global_backward_hooks
            or module._global_backward_pre_hooks
        )
    )


_LINEAR_TYPES = (nn.Linear, NonDynamicallyQuantizableLinear)


def split_heads(x: Tensor, head_dim: int, batch_first: bool) -> Tensor:
    """View a projection as (N, L, H, D), without a copy.

    Args:
        x: (N, L, E) if ``batch_first``, else (L, N, E), or (L, E).
        head_dim: D; the number of heads follows from E, so that a shard of the heads works too.
        batch_first: the layout of 3-D ``x``.

    Returns:
        (N, L, H, D), N = 1 for (L, E).
    """
    x = x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    if x.dim() == 3:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def merge_heads(x: Tensor, is_batched: bool, batch_first: bool) -> Tensor:
    """The inverse of `split_heads`: (N, L, H, D) to a contiguous (N, L, E), (L, N, E) or (L, E)."""
    x = x.flatten(2)
    if not is_batched:
        return x.squeeze(0).contiguous()
    return (x if batch_first else x.transpose(0, 1)).contiguous()

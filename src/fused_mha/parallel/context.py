"""`context_parallel`: modules whose sequence is sharded, with ring attention in the place of the core.

Users call it once on a model. `MultiHeadAttention.forward` then comes here.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from fused_mha.core.inputs import AttentionResult
from fused_mha.module import steps
from fused_mha.module.arguments import ModuleArguments, check_are_tensors
from fused_mha.module.cache import KeyValueCache
from fused_mha.module.multi_head_attention import MultiHeadAttention
from fused_mha.parallel import ring
from fused_mha.parallel.groups import Group, check_on_every_rank, group_of
from fused_mha.parallel.zigzag import positions_of

Model = TypeVar("Model", bound=nn.Module)


def context_parallel(model: Model, group: Group = None) -> Model:
    """Let every `MultiHeadAttention` of a model attend over sequences that are sharded over ranks.

    Give the model the rank's part of each sequence, as `shard` cuts it, and of the targets. Self-attention is then over
    the whole sequence, and everything else in a Transformer is of single tokens anyway. ``rope`` turns by the places in
    the whole sequence; a model with learned positions has to be given those of the part. Every rank has all parameters,
    and their gradients are of its part alone: DDP or FSDP2 over these ranks averages them as over a batch.

    Parameters and ``state_dict`` stay, so that this can come before or after FSDP2 and tensor parallelism.

    Args:
        model: whose modules are changed, in place; or one `MultiHeadAttention`.
        group: the ranks of the ring: a process group, a mesh of one dimension, or None for all ranks.

    Returns:
        The model.

    Raises:
        ValueError: no `MultiHeadAttention` is in the model, or one has an option that a ring does not know: ``window``,
            ``alibi``, ``add_bias_kv``, ``add_zero_attn``.

    Examples:
        >>> model = fused_mha.parallel.context_parallel(model, mesh["context"])
        >>> logits = model(fused_mha.parallel.shard(tokens, mesh["context"]))

    Source:
        Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (arXiv 2310.01889).
    """
    found = group_of(group)
    modules = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if not modules:
        raise ValueError(
            f"model must have a fused_mha.MultiHeadAttention in it; got {type(model).__name__} without one"
        )
    for module in modules:
        if unknown := _unknown_to_a_ring(module):
            raise ValueError(f"a ring knows no {' and no '.join(unknown)}, which a module of the model has")
    for module in modules:
        module.context = _Context(found)
    return model


def _unknown_to_a_ring(module: MultiHeadAttention) -> list[str]:
    options = module.options
    has = {
        "window": options is not None and options.window is not None,
        "alibi": options is not None and options.alibi_slopes is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
    }
    return [name for name, is_on in has.items() if is_on]


class _Context:
    """What stands in for the forward of a module from its checks on."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Context:
        return self  # a process group can't be copied

    def __call__(
        self,
        module: MultiHeadAttention,
        arguments: ModuleArguments,
        positions: Tensor | None,
        cache: Any,
        weights_of_heads: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What `MultiHeadAttention.forward` returns."""
        prepared: list[steps.Prepared] = []

        def check() -> str:
            found = self._prepared(module, arguments, positions, cache, weights_of_heads)
            prepared.append(found)
            return ring.checked(found.inputs)

        check_on_every_rank(self.group, arguments.query, "MultiHeadAttention", check)
        (found,) = prepared
        heads = ring.attend(found.inputs, self.group)
        return steps.leave(module, AttentionResult(heads, None, None), found.embedded, found.is_batched)

    def _prepared(
        self,
        module: MultiHeadAttention,
        arguments: ModuleArguments,
        positions: Tensor | None,
        cache: KeyValueCache | None,
        weights_of_heads: Any,
    ) -> steps.Prepared:
        check_are_tensors(*arguments[:3])
        if arguments.need_weights:
            raise ValueError("need_weights must be False over a sharded sequence: no rank has all of a row's weights")
        for name, given in (
            ("attn_mask", arguments.attn_mask),
            ("cache", cache),
            ("weights_of_heads", weights_of_heads),
        ):
            if given is not None:
                raise ValueError(f"{name} must be None over a sharded sequence")
        query = arguments.query
        if query.is_nested:
            raise ValueError("query must be a strided tensor over a sharded sequence; got a nested one")
        if positions is None and module.options is not None and module.options.rope is not None:
            length = query.shape[1 if module.batch_first and query.dim() == 3 else 0]
            rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
            positions = positions_of(rank, size, length, query.device)
        return steps.prepare(module, arguments, positions, None)

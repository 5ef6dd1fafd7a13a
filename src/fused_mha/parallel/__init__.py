"""Attention over several processes, on `torch.distributed` alone; `import fused_mha.parallel` for it."""

from fused_mha.parallel.context import context_parallel
from fused_mha.parallel.ring import ring_attention
from fused_mha.parallel.tensor import HeadwiseParallel
from fused_mha.parallel.zigzag import shard, unshard

__all__ = ["HeadwiseParallel", "context_parallel", "ring_attention", "shard", "unshard"]

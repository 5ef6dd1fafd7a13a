"""The operators `torch.ops.fused_mha.*`, defined when this package is imported, before any call."""

from fused_mha.ops import autograd, fake, fallback, heads, module, module_autograd, product

__all__ = ["autograd", "fake", "fallback", "heads", "module", "module_autograd", "product"]

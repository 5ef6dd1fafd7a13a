"""fused_mha: multi-head attention for PyTorch, a drop-in for `torch.nn.MultiheadAttention`."""

from importlib.metadata import version as _version

from fused_mha.convert import ConversionReport, convert, revert
from fused_mha.core.attention import attention
from fused_mha.core.dispatch import Explanation, backend
from fused_mha.core.inputs import AttentionResult
from fused_mha.core.packing import pack, unpack
from fused_mha.core.varlen import varlen_attention
from fused_mha.integrations.sdpa import ServedCalls, scaled_dot_product_attention, serve_sdpa
from fused_mha.module.cache import KeyValueCache
from fused_mha.module.explanation import explain
from fused_mha.module.loading import pool_key_heads
from fused_mha.module.multi_head_attention import MultiHeadAttention
from fused_mha.module.rotary import LinearScaling, Llama3Scaling, NTKScaling, RotaryEmbedding, YaRNScaling
from fused_mha.warm_up import warm_up

__version__ = _version("fused-mha")

__all__ = [
    "AttentionResult",
    "ConversionReport",
    "Explanation",
    "KeyValueCache",
    "LinearScaling",
    "Llama3Scaling",
    "MultiHeadAttention",
    "NTKScaling",
    "RotaryEmbedding",
    "ServedCalls",
    "YaRNScaling",
    "attention",
    "backend",
    "convert",
    "explain",
    "pack",
    "pool_key_heads",
    "revert",
    "scaled_dot_product_attention",
    "serve_sdpa",
    "unpack",
    "varlen_attention",
    "warm_up",
]

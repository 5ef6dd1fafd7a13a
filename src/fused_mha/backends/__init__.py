"""The back ends behind `fused_mha.attention`; `fused_mha.core.dispatch` orders them."""

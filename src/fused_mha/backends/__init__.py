"""The back ends behind `fused_mha.attention`; `fused_mha.dispatch` orders them."""

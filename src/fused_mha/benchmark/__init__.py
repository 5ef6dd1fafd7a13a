"""The benchmark that anyone can rerun, `python -m fused_mha.benchmark`; `benchmarks/` of the checkout builds on it."""

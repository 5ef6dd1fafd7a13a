"""The parity command, `python -m fused_mha.parity`, and what `pytest --fused-mha-parity` shares with it."""

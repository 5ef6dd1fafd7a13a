"""The parity kit: compare an attention module with torch's in your own tests.

`assert_parity` compares any two modules; `Case` and `grid` describe the configurations that `python -m
fused_mha.parity` runs.
"""

from fused_mha.testing.cases import Case, grid
from fused_mha.testing.parity import Comparison, assert_parity, compare
from fused_mha.testing.tolerances import tolerance

__all__ = ["Case", "Comparison", "assert_parity", "compare", "grid", "tolerance"]

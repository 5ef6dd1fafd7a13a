"""The benchmarks' own code, as far as it can be tested without timing anything."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where its files import each other from

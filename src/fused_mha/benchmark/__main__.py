"""`python -m fused_mha.benchmark`."""

import sys

from fused_mha.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m fused_mha.parity`."""

import sys

from fused_mha.parity.command import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m fused_mha`: says which commands there are."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Multi-head attention for PyTorch, a drop-in for torch.nn.MultiheadAttention. The commands are

python -m fused_mha.info       versions, devices, threads and back ends, for bug reports
python -m fused_mha.parity     compares with the installed torch: hundreds of configurations, or your own model
python -m fused_mha.benchmark  times the module or your own shapes beside torch's, in half a minute

--help after one of them lists its options.
"""


def main() -> None:
    """Print the commands of the package."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_mha",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()

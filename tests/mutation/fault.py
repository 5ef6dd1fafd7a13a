"""One fault; the files `*_faults.py` list them."""

from typing import NamedTuple

GENERIC = "src/fused_mha/csrc/generic/"
PACKAGE = "src/fused_mha/"


class Fault(NamedTuple):
    """One fault; `tests` are arguments of pytest."""

    name: str
    file: str
    text: str
    replacement: str
    tests: str

"""What the import of the package says where there is no Triton."""

import subprocess
import sys

# Only CUDA builds of torch look for Triton as they count floating-point operations: this one claims to be such.
IMPORT = """
import sys, torch
sys.modules["triton"], torch.version.cuda = None, "13.0"
import fused_mha, logging
from torch.utils import flop_counter
assert torch.ops.fused_mha.attention in flop_counter.flop_registry
assert logging.getLogger(flop_counter.__name__).isEnabledFor(logging.WARNING)
"""


def test_import_without_triton_is_silent():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""

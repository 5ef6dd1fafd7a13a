"""The Triton kernels compiled ahead of time for sm_80, sm_86 and sm_90: they fit the chip, and spill few registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    90: 227 << 10,
}  # bytes, CUDA C++ Programming Guide, table "Technical Specifications"
MOST_STACK = 256  # bytes of each thread that do not fit its registers
SCRIPT = Path(__file__).with_name("compile_ahead.py")
CASES = {
    "causal and padding, 64": {"architecture": 80, "dtype": "bfloat16", "D": 64, "padding": True},
    "causal and padding, 128": {"architecture": 90, "dtype": "bfloat16", "D": 128, "padding": True},
    "float mask": {"architecture": 90, "dtype": "float16", "D": 64, "masks": "float32"},
    "bool mask": {"architecture": 90, "dtype": "bfloat16", "D": 64, "masks": "bool"},
    "dropout": {"architecture": 90, "dtype": "bfloat16", "D": 64, "dropout": True},
    "bool mask, weights, one head": {
        "architecture": 80,
        "dtype": "bfloat16",
        "D": 128,
        "N": 1,
        "H": 1,
        "masks": "bool",
        "weights": True,
    },
    "fp32, virtual keys": {"architecture": 80, "dtype": "float32", "D": 64, "virtual": True},
    "fp32, large heads": {"architecture": 80, "dtype": "float32", "D": 256, "padding": True},
    "small chip": {"architecture": 86, "dtype": "float16", "D": 64, "masks": "float32", "weights": True},
    "small chip, large heads": {"architecture": 86, "dtype": "bfloat16", "D": 256, "padding": True},
    "large heads": {"architecture": 90, "dtype": "bfloat16", "D": 256},
}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_fits_the_chip(architecture):
    cases = {name: case for name, case in CASES.items() if case["architecture"] == architecture}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), json.dumps(list(cases.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, kernels in zip(cases, json.loads(done.stdout), strict=True):
        assert {"forward", "grad_query", "grad_key_value"} <= {kernel["name"] for kernel in kernels}
        for kernel in kernels:
            assert kernel["shared"] <= SHARED_MEMORY[architecture], (name, kernel)
            assert kernel["stack"] <= MOST_STACK, (name, kernel)

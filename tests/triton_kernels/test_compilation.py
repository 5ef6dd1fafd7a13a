"""The Triton kernels compiled ahead of time for sm_80, sm_86 and sm_90: they fit the chip, and their code is whole."""

import json
import os
import random
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
MOST_STACK = {80: 256, 86: 256, 90: 1024}  # bytes of each thread that do not fit its registers; the fastest tiles spill
SCRIPT = Path(__file__).with_name("compile_ahead.py")
CASES = {
    80: {
        "bool mask, weights, one head": {"D": 128, "N": 1, "H": 1, "masks": "bool", "weights": True},
        "fp32, large heads": {"dtype": "float32", "D": 256, "padding": True},
        "fp32, packed, virtual keys": {"dtype": "float32", "D": 64, "packed": True, "virtual": True},
        "sinks, ALiBi, padding": {"D": 64, "of_heads": ["sinks", "alibi_slopes"], "padding": True},
    },
    86: {
        "float mask, weights": {"dtype": "float16", "D": 64, "masks": "float32", "weights": True},
        "large heads": {"D": 256, "padding": True},
    },
    90: {
        "causal and padding, 64": {"D": 64, "padding": True},
        "causal and padding, 128": {"D": 128, "padding": True},
        "float mask and dropout, 128": {"D": 128, "masks": "float32", "dropout": True},
        "bool mask, 128": {"D": 128, "masks": "bool"},
        "large heads": {"D": 256},
        "fp32": {"dtype": "float32", "D": 40, "D_v": 24, "H": 2, "H_kv": 1},
        "weights of some heads": {"D": 64, "weights": True, "weights_of_heads": [3, 0], "padding": True},
        "softcap, sinks, ALiBi, dropout": {"D": 128, "softcap": 2.0, "of_heads": ["sinks", "alibi_slopes"], "H_kv": 2}
        | {"dropout": True},
        "packed, options": {"D": 128, "packed": True, "padding": True, "virtual": True, "H_kv": 2}
        | {"of_heads": ["sinks", "alibi_slopes"]},
    },
}
MORE = {
    80: {
        "causal and padding, 64": {"D": 64, "padding": True},
        "fp32, virtual keys": {"dtype": "float32", "D": 64, "virtual": True},
        "softcap": {"D": 64, "softcap": 30.0},
        "fp32, softcap, sinks": {"dtype": "float32", "D": 64, "softcap": 30.0, "of_heads": ["sinks"]},
        "fp32, packed": {"dtype": "float32", "D": 64, "packed": True},
    },
    86: {"packed": {"D": 64, "packed": True}},
    90: {
        "plain, 64": {"D": 64},
        "plain, 128": {"D": 128},
        "float mask": {"dtype": "float16", "D": 64, "masks": "float32"},
        "dropout": {"D": 64, "dropout": True},
        "float mask and dropout": {"D": 64, "masks": "float32", "dropout": True},
        "float mask, 128": {"D": 128, "masks": "float32", "weights": True},
        "bool mask": {"D": 64, "masks": "bool"},
        "dropout, bool mask, 128": {"D": 128, "dropout": True, "masks": "bool"},
        "softcap, 128": {"D": 128, "softcap": 30.0, "padding": True, "weights": True},
        "sinks": {"D": 64, "of_heads": ["sinks"], "H_kv": 2},
        "ALiBi, virtual keys": {"D": 64, "of_heads": ["alibi_slopes"], "virtual": True},
        "softcap, sinks, ALiBi, dropout, 64": {"D": 64, "softcap": 2.0, "of_heads": ["sinks", "alibi_slopes"]}
        | {"dropout": True},
        "packed, 128": {"D": 128, "packed": True, "H_kv": 2},
        "packed, options, 64": {"D": 64, "packed": True, "padding": True, "virtual": True}
        | {"of_heads": ["sinks", "alibi_slopes"]},
    },
}


def uneven(D, D_v, **call):
    """Of a D and a D_v whose tiles have different widths."""
    return {"D": D, "D_v": D_v, "H": 2, "H_kv": 1, "N": 3, "L": 77, "S": 131, **call}


VIRTUAL = {"padding": True, "virtual": True}
UNEVEN = {
    "40, 24": uneven(40, 24),
    "8, 40, padding, virtual keys": uneven(8, 40, **VIRTUAL),
    "20, 12": uneven(20, 12),
}
MORE_UNEVEN = {
    "40, 24, padding, virtual keys": uneven(40, 24, **VIRTUAL),
    "8, 40": uneven(8, 40),
    "20, 12, padding, virtual keys": uneven(20, 12, **VIRTUAL),
}


def printed(*arguments):
    """By the script, which runs without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def compiled(architecture, cases):
    """The kernels of each."""
    calls = [{"architecture": architecture, "dtype": "bfloat16"} | case for case in cases.values()]
    return dict(zip(cases, printed(json.dumps(calls)), strict=True))


@pytest.mark.parametrize(
    ("architecture", "cases"),
    [*CASES.items(), (90, UNEVEN)]
    + [pytest.param(*more, marks=pytest.mark.thorough) for more in (*MORE.items(), (90, MORE_UNEVEN))],
)
def test_fits_the_chip_and_reads_no_register_that_nothing_has_set(architecture, cases):
    for name, kernels in compiled(architecture, cases).items():
        assert {"forward", "grad_query", "grad_key_value"} <= {kernel["name"] for kernel in kernels}
        for kernel in kernels:
            assert kernel["shared"] <= SHARED_MEMORY[architecture], (name, kernel)
            assert kernel["stack"] <= MOST_STACK[architecture], (name, kernel)
            assert not kernel["reads of nothing"], (name, kernel)


@pytest.mark.thorough
@pytest.mark.parametrize("cases", [UNEVEN, MORE_UNEVEN])
def test_without_the_newer_assembler_the_code_is_whole_too(cases):
    cases = {name: case | {"newer_assembler": False} for name, case in cases.items()}
    for name, kernels in compiled(90, cases).items():
        for kernel in kernels:
            assert not kernel["reads of nothing"], (name, kernel)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"padding": True},
        {"dropout": True, "weights": True, "virtual": True},
        {"softcap": 30.0, "of_heads": ["sinks", "alibi_slopes"]},
        {"weights": True, "weights_of_heads": [0]},
        {"packed": True, "padding": True},
    ],
    ids=str,
)
def test_one_variant_of_each_kernel_serves_all_lengths_batches_and_heads(kind):
    draw = random.Random(0)
    calls = [
        {"architecture": 90, "dtype": "bfloat16", "D": 64, **kind}
        | {"N": draw.choice([1, 2, 3, 16, 32]), "H": draw.choice([1, 2, 12, 16])}
        | {"L": draw.choice([1, 2, 16, 128, draw.randint(1, 500)]), "S": draw.choice([1, 48, draw.randint(1, 500)])}
        for _ in range(30)
    ]
    if "weights" in kind:  # whose rows are of 16 bytes or not
        calls = [call | {"S": call["S"] // 8 * 8 + 6} for call in calls]
    if "weights_of_heads" in kind:
        calls = [
            call | {"weights_of_heads": draw.sample(range(call["H"]), draw.randint(1, call["H"]))} for call in calls
        ]
    if "softcap" in kind:
        calls = [call | {"softcap": draw.choice([1.0, 16.0, 30.0])} for call in calls]
    assert set(printed("variants", json.dumps(calls)).values()) == {1}

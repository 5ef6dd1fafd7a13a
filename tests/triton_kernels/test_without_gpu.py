"""What is compiled, and when, by Triton's own compiler and launcher: no GPU is needed to count that."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("calls_without_gpu.py")
DRIVER = Path(__file__).parents[2] / "benchmarks" / "fake_cuda" / "driver.c"
KERNELS = 3  # of a call and its gradient: forward, grad_query, grad_key_value


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder of a libcuda that does nothing."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, DRIVER], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return folder


@pytest.fixture(scope="module")
def counts(driver, tmp_path_factory):
    """Runs steps in a process of its own: [compiled, taken from disk, variants in the process] after each."""
    cache = tmp_path_factory.mktemp("cache")

    def count(*steps, cache=cache):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver)}
        command = [sys.executable, str(SCRIPT), json.dumps(steps)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment | {"TRITON_CACHE_DIR": str(cache)}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return count


def test_one_variant_serves_all_lengths_batches_and_strides_and_a_second_process_compiles_none(counts):
    draw = random.Random(0)
    lengths = [1, 2, 15, 16, 17, 64, *(draw.randint(1, 300) for _ in range(24))]
    layouts = ("contiguous", "packed", "heads first", "odd")
    calls = [
        {"N": draw.choice([1, 2, 3, 16, 32]), "L": L, "S": draw.choice([1, 16, L, draw.randint(1, 300)])}
        | {"H": draw.choice([1, 2, 12]), "layout": draw.choice(layouts), "is_causal": draw.random() < 0.5}
        | {"padding": True}
        for L in lengths
    ]
    assert {call["layout"] for call in calls} == set(layouts)
    first, others = counts({"calls": calls[:1]}, {"calls": calls})
    assert first == [KERNELS, 0, KERNELS]
    assert others == [0, 0, KERNELS]
    assert counts({"calls": calls}) == [[0, KERNELS, KERNELS]]


def test_one_variant_serves_packed_sequences_of_all_lengths_and_numbers(counts, tmp_path):
    calls = [
        {"sequences": sequences, "tokens": tokens, "H": H, **flags}
        for sequences, tokens, H in ((1, 16, 4), (3, 1, 1), (16, 77, 12), (0, 5, 2))
        for flags in ({}, {"is_causal": True})
    ]
    assert counts({"packed": calls[:1]}, {"packed": calls}, cache=tmp_path) == [[KERNELS, 0, KERNELS], [0, 0, KERNELS]]


def test_after_warm_up_nothing_is_compiled(counts, tmp_path):
    flags = {"key_padding_mask": "bool", "need_weights": True}
    call = {"padding": True, "need_weights": True, "backward": False}
    calls = [call | {"L": L, "S": S} for L, S in ((5, 16), (300, 128))]
    warm, called = counts({"warm_up": [[[16], [flags], False]]}, {"calls": calls}, cache=tmp_path)
    assert warm == [3, 0, 3]  # forward, weights, and what keeps a module's hidden rows finite
    assert called == [0, 0, 3]


@pytest.mark.thorough
def test_softcap_sinks_and_slopes_are_warmed_up_too(counts, tmp_path):
    of_heads = {"sinks": "float32", "alibi_slopes": "float32"}
    calls = [
        {"L": L, "H": H, "softcap": softcap, "of_heads": [*of_heads]}
        for L, H, softcap in ((5, 3, 1.5), (300, 16, 30.0))
    ]
    steps = ({"warm_up": [[[16], [{"softcap": 2.0, **of_heads}], True]]}, {"calls": calls})
    assert counts(*steps, cache=tmp_path) == [[KERNELS, 0, KERNELS], [0, 0, KERNELS]]


@pytest.mark.thorough
def test_modules_of_all_sizes_and_layouts_take_the_kernels_that_warm_up_compiles(counts, tmp_path):
    modules = [
        {"N": N, "L": L, "E": 16 * H, "num_heads": H, "batch_first": batch_first, "backward": True}
        for N, L, H, batch_first in ((1, 3, 2, True), (3, 40, 1, False), (2, 7, 4, True), (5, 1, 2, False))
    ]
    steps = ({"warm_up": [[[16], [{"key_padding_mask": "bool"}], True]]}, {"modules": modules})
    assert counts(*steps, cache=tmp_path) == [[KERNELS + 1, 0, KERNELS + 1], [0, 0, KERNELS + 1]]

"""Finding, loading and choosing: instruction sets, the environment variable, the ABI version, threads."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_mha
from attention_oracle import make_arguments, run_with_gradients
from fused_mha.backends import native
from fused_mha.backends.cpu import LIBRARY
from native.c_abi import ISAS, ISAS_OF, C
from native.dense_oracle import native_attention


def python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
        check=False,
    )


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_variable_chooses_each_instruction_set(name, monkeypatch):
    former = LIBRARY.isa
    monkeypatch.setenv("FUSED_MHA_ISA", name)
    try:
        assert native.Library(LIBRARY.path).isa == name
        assert C.fused_mha_isa() == name.encode()
    finally:
        LIBRARY.set_isa(former)


def test_an_unknown_instruction_set_fails_the_import_and_lists_the_valid_ones():
    done = python("-c", "import fused_mha", FUSED_MHA_ISA="sse9")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("RuntimeError: FUSED_MHA_ISA must be one of ")
    assert "'sse9'" in error
    assert all(re.search(rf"\b{name}\b", error) for name in ISAS)


@pytest.mark.parametrize("command", ["fused_mha", "fused_mha.info", "fused_mha.parity"])
def test_a_command_says_so_in_one_line(command):
    done = python("-m", command, FUSED_MHA_ISA="sse9")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fused_mha: FUSED_MHA_ISA must be one of ")


def test_the_command_of_another_package_has_the_exception(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import fused_mha")
    done = python("-m", "theirs.command", FUSED_MHA_ISA="sse9", PYTHONPATH=str(tmp_path))
    assert done.stderr.startswith("Traceback")


X86_FLAGS = {
    "scalar": "sse2",
    "avx2": "avx2 fma f16c bmi2",
    "avx512": "avx2 fma f16c bmi2 avx512f avx512bw avx512dq avx512vl",
    "avx512_bf16": "avx2 fma f16c bmi2 avx512f avx512bw avx512dq avx512vl avx512_bf16",
    "avx512_amx": "avx2 fma f16c bmi2 avx512f avx512bw avx512dq avx512vl avx512_bf16 amx_tile amx_bf16",
}


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64",
    reason="only Linux on x86-64 lists these instructions there",
)
def test_the_instruction_sets_are_those_that_the_operating_system_lists():
    listed = set(re.findall(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    names = [name for name, flags in X86_FLAGS.items() if listed >= set(flags.split())]
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text() and listed >= {"avx512_bf16", "avx512_fp16"}:
        names.remove("avx512")  # whose products of fp32 are twice as fast as the dot products of bfloat16
        names.insert(names.index("avx512_bf16") + 1, "avx512")
    assert names == ISAS


def test_what_adds_products_of_bfloat16_to_another_leaves_all_else_to_it():
    added = {"avx512_bf16", "avx512_amx"}
    for dtype, names in ISAS_OF.items():
        assert names == [name for name in ISAS if dtype == torch.bfloat16 or name not in added]


def test_set_isa_refuses_an_unknown_name_and_keeps_the_former():
    former = LIBRARY.isa
    for wrong in ("", "AVX2", "avx", "avx512 ", "né"):
        with pytest.raises(RuntimeError, match=re.escape(", ".join(ISAS))):
            LIBRARY.set_isa(wrong)
    assert LIBRARY.isa == former


def test_the_best_instruction_set_is_the_default():
    variables = {name: value for name, value in os.environ.items() if name != "FUSED_MHA_ISA"}
    code = "from fused_mha.backends.cpu import LIBRARY; print(LIBRARY.isa)"
    environment = variables | {"FUSED_MHA_ISA": ""}  # as if it were not set
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ISAS[-1]


def test_explain_names_the_instruction_set_in_use(isa):
    assert LIBRARY.isa == isa
    x = torch.randn(2, 3, 8)
    with fused_mha.backend("cpu"):
        explanation = fused_mha.explain(fused_mha.MultiHeadAttention(8, 2), x, x, x)
    assert explanation.notes == [f"instruction set {isa}"]


def test_another_abi_version_gives_an_error_that_names_both(monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    with pytest.raises(
        RuntimeError, match=r"libfused_mha\S* has ABI version \d+, this package needs 999.*[Rr]einstall"
    ):
        native.Library(LIBRARY.path)


def test_a_torch_without_a_function_that_is_needed_is_refused_by_its_name():
    register = C.fused_mha_register_operators
    register.restype = ctypes.c_int64
    assert register(ctypes.c_void_p(C._handle)) == -1  # a library that is not torch's
    assert re.fullmatch(r"this torch has no function (aoti_)?torch_\w+", C.fused_mha_last_error().decode())


def test_a_library_without_a_version_gives_the_same_error(tmp_path):
    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    if not other.exists():
        other = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    with pytest.raises(RuntimeError, match=r"has ABI version None, this package needs \d+"):
        native.Library(other)


def test_a_stub_of_another_version_is_refused_by_load(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = tmp_path / "stub.c"
    source.write_text("#include <stdint.h>\nint64_t fused_mha_abi_version(void) { return 4000000000; }\n")
    stub = tmp_path / native.NAMES[0]
    subprocess.run([compiler, "-shared", "-fPIC", "-o", stub, source], check=True, timeout=60)
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(stub))} has ABI version"):
        native.load([str(tmp_path / "nowhere"), str(tmp_path)])


def test_an_installation_without_the_library_loads_none(tmp_path):
    assert native.load([str(tmp_path)]) is None


PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ctypes.c_void_p,
)


@pytest.fixture
def parallel_for():
    """Let the library run its parallel loops by a function of ours until the end of the test."""
    kept = []

    def use(function):
        kept.append(PARALLEL_FOR(function))
        C.fused_mha_set_parallel_for(kept[-1])

    yield use
    C.fused_mha_set_parallel_for(native._torch_parallel_for())


LARGE = {"N": 2, "L": 300, "S": 1200, "H": 4, "H_kv": 4, "D": 16, "D_v": 16}


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_every_parallel_loop_follows_torch_set_num_threads(threads, set_num_threads, parallel_for):
    ranges = []

    def record(begin, end, grain, work, context):
        ranges.append((begin, end, grain))
        work(begin, end, context)
        return 0

    arguments = make_arguments(**LARGE, mask_dtype=torch.float32, mask_shape="LS")
    set_num_threads(1)
    expected = run_with_gradients(native_attention, arguments)
    parallel_for(record)
    set_num_threads(threads)
    results = run_with_gradients(native_attention, arguments)
    assert ranges == [(0, threads, 1)] * len(ranges)
    assert len(ranges) >= 2  # forward and backward
    assert all(torch.equal(results[name], x) for name, x in expected.items())


@pytest.mark.parametrize("order", ["in order", "reversed", "one by one"])
def test_no_schedule_of_the_workers_deadlocks_or_changes_a_bit(base_isa, order, set_num_threads, parallel_for):
    """Also not where one thread runs all of them, one after the other, as inside another parallel region."""

    def schedule(begin, end, grain, work, context):
        if order == "in order":
            work(begin, end, context)
        workers = range(begin, end) if order == "one by one" else reversed(range(begin, end))
        for worker in workers if order != "in order" else ():
            work(worker, worker + 1, context)
        return 0

    for extra in ({"mask_dtype": torch.float32, "mask_shape": "LS"}, {"need_weights": True, "bias_kv": True}):
        arguments = make_arguments(**LARGE | {"L": 60}, **extra)
        set_num_threads(1)
        expected = run_with_gradients(native_attention, arguments)
        set_num_threads(4)
        parallel_for(schedule)
        results = run_with_gradients(native_attention, arguments)
        assert all(torch.equal(results[name], x) for name, x in expected.items())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process' threads there")
def test_the_library_starts_no_threads_beside_torchs():
    code = """
import os, torch, fused_mha
def call():
    x = torch.randn(4, 300, 4, 16, requires_grad=True)
    with fused_mha.backend("cpu"):
        fused_mha.attention(x, x, x).output.sum().backward()
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
alone = call()
torch.set_num_threads(3)
with_ours = call()
y = torch.ones(3_000_000) * 2 + 1
(y.view(1000, 3000) @ y.view(3000, 1000))
after_torch = len(os.listdir("/proc/self/task"))
print(alone, with_ours, after_torch, call())
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    alone, with_ours, after_torch, again = map(int, done.stdout.split())
    assert with_ours == alone + 2  # the two that torch's loop adds to the calling one
    assert after_torch == with_ours  # the same ones
    assert again == with_ours

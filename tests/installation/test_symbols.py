"""What the C++ library exports and needs, and that no instruction set's code can stand in for another's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_mha.backends import cpu

SOURCES = Path(__file__).parents[2] / "src/fused_mha/csrc"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def tool(name):
    path = shutil.which(name)
    return path or pytest.skip(f"{name} is not installed")


def output_of(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def symbols(path, *options):
    """Pairs of a symbol's type, as nm prints it, and its name."""
    lines = output_of(tool("nm"), "--no-demangle", *options, path).splitlines()
    return {tuple(line.split()[-2:]) for line in lines if line and not line.endswith(":")}


@pytest.fixture
def library():
    if cpu.LIBRARY is None:
        pytest.skip("this installation has no C++ library")
    return cpu.LIBRARY.path


def test_library_exports_the_functions_of_its_header_alone(library):
    declared = set(re.findall(r"FUSED_MHA_EXPORT [\w* ]*?(fused_mha_\w+)\(", (SOURCES / "c_api.h").read_text()))
    exported = {name for _, name in symbols(library, "--dynamic", "--defined-only")}
    assert exported == declared
    assert "fused_mha_forward" in declared


def test_library_needs_neither_torch_nor_openmp_nor_python(library):
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", output_of(tool("readelf"), "--dynamic", "--wide", library))
    own = re.compile(r"(libstdc\+\+|libgcc_s|libm|libc|libdl|libpthread|ld-linux-[\w-]+)\.so\.\d+")
    assert needed
    assert not [name for name in needed if not own.fullmatch(name)]
    undefined = {name for _, name in symbols(library, "--dynamic", "--undefined-only")}
    foreign = re.compile(r"torch|aoti|c10|at6|Py|GOMP|omp_|kmpc")
    assert undefined
    assert not [name for name in undefined if foreign.search(name)]


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("cmake") is None, reason="needs a compiler and CMake")
def test_no_instruction_set_emits_a_weak_symbol(tmp_path):
    # Of several weak definitions the linker keeps one: it may need AVX-512, and be called on every machine.
    output_of("cmake", "-S", SOURCES, "-B", tmp_path)
    output_of("cmake", "--build", tmp_path, "--target", "instruction_sets")
    objects = [path for path in tmp_path.rglob("*.o") if path.parent.name == "isa"]
    assert {path.name.partition(".")[0] for path in objects} >= {"scalar"}
    for path in objects:
        of_object = symbols(path, "--defined-only")
        assert not [name for kind, name in of_object if kind in "WVuwv"], path.name
        exported = [name for kind, name in of_object if kind.isupper()]
        assert len(exported) == 1, exported  # the table of its kernels
        assert "7kernels" in exported[0]

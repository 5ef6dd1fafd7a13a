"""Puts faults into the sources, one at a time, and asks the part of the suite that should notice whether it does.

    python tests/mutation/run.py [NAME...] [--every-isa]

`faults.py` has the faults. Each is applied in a copy of the working tree, below out/mutation; those of csrc/ are built
there, for the portable instruction set alone unless `--every-isa`, which takes minutes for each. Names choose some, by
their beginning. It ends with an error if a fault survives, or if the tests of the copy fail without one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fault import Fault
from faults import FAULTS

PROJECT = Path(__file__).resolve().parents[2]
HOME = PROJECT / "out" / "mutation"
TREE, BUILD = HOME / "tree", HOME / "build"
CSRC = TREE / "src" / "fused_mha" / "csrc"
LIBRARY = TREE / "src" / "fused_mha" / "libfused_mha.so"


def copy_tree() -> None:
    """The files that Git knows or would take, as they are now; what is equal keeps its time, and its build."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines():
        source, to = PROJECT / name, TREE / name
        if source.is_file() and not (to.exists() and to.read_bytes() == source.read_bytes()):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)


def build(every_isa: bool) -> str | None:
    """What the compiler says, if it fails."""
    # For a processor that the sources do not know, there is the portable instruction set alone.
    portable = [] if every_isa else ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=other"]
    for command in (["cmake", "-S", CSRC, "-B", BUILD, *portable], ["cmake", "--build", BUILD, "--parallel"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            return result.stdout + result.stderr
    shutil.copyfile(BUILD / LIBRARY.name, LIBRARY)
    return None


def run_tests(tests: str) -> subprocess.CompletedProcess[str]:
    # -S: without the hook of an editable installation, which would import the package from the working tree.
    path = os.pathsep.join([str(TREE / "src"), *sys.path])
    return subprocess.run(
        [sys.executable, "-S", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--thorough", *tests.split(" ")],
        cwd=TREE,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def survives(fault: Fault, every_isa: bool) -> str | None:
    """Why a fault was not noticed, if so."""
    file = TREE / fault.file
    right, right_library = file.read_text(), LIBRARY.read_bytes()
    if right.count(fault.text) != 1:
        return f"its text is in {fault.file} {right.count(fault.text)} times: the fault has to follow the sources"
    try:
        file.write_text(right.replace(fault.text, fault.replacement))
        if file.is_relative_to(CSRC) and (error := build(every_isa)):
            return f"it does not compile:\n{error}"
        result = run_tests(fault.tests)
    finally:
        file.write_text(right)
        LIBRARY.write_bytes(right_library)
    if result.returncode == 1:
        return None
    return "all tests pass" if result.returncode == 0 else f"the tests do not run:\n{result.stdout}{result.stderr}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="the faults to put in, by the beginning of their names")
    parser.add_argument("--every-isa", action="store_true", help="build and test each instruction set")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.name.startswith(tuple(options.names) or "")]
    copy_tree()
    if error := build(options.every_isa):
        print(error)
        return 1
    for tests in sorted({fault.tests for fault in chosen}):
        result = run_tests(tests)
        if result.returncode:
            print(f"without a fault, {tests}:\n{result.stdout}{result.stderr}")
            return 1
    survivors = []
    for fault in chosen:
        start = time.monotonic()
        reason = survives(fault, options.every_isa)
        print(f"{'SURVIVES' if reason else 'noticed':<9} {time.monotonic() - start:5.0f} s  {fault.name}", flush=True)
        if reason:
            survivors.append(f"{fault.name}: {reason}")
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} faults noticed", *survivors, sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

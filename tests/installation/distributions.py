"""Checks what is published: wheels and the source distribution. `.ci/run` calls it, and the workflow of the wheels:

    python tests/installation/distributions.py [--tag v0.1.0] dist/*

They have to be of the version in pyproject.toml, which a tag names and the changelog describes. A wheel serves every
Python, and has the C++ library but for Windows. The source distribution has the files that git knows.
"""

import argparse
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LIBRARY_OF_PLATFORM = {
    "linux": "fused_mha/libfused_mha.so",
    "manylinux": "fused_mha/libfused_mha.so",
    "macosx": "fused_mha/libfused_mha.dylib",
    "win": None,
}
NOT_IN_THE_SOURCES = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")  # for those who work on a checkout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="the tag that publishes them")
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()

    (version,) = re.findall(r'^version = "(.+)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    if options.tag is not None:
        assert options.tag == f"v{version}", f"the tag is {options.tag}, the version in pyproject.toml {version}"
        assert f"\n## [{version}] - " in (PROJECT / "CHANGELOG.md").read_text(), f"CHANGELOG.md has no {version}"

    wheels = [path for path in options.files if path.suffix == ".whl"]
    sources = [path for path in options.files if path.suffix != ".whl"]
    assert [path.name for path in sources] == [f"fused_mha-{version}.tar.gz"], sources
    check_sources(sources[0])
    libraries = [check_wheel(path, version) for path in wheels]
    assert any(libraries), f"no wheel has the C++ library: {wheels}"


def check_wheel(path: Path, version: str) -> str | None:
    """Returns the library in it."""
    platforms = "|".join(LIBRARY_OF_PLATFORM)
    match = re.fullmatch(rf"fused_mha-{re.escape(version)}-py3-none-({platforms})_[\w.]+\.whl", path.name)
    assert match, f"{path.name} is not a wheel of {version} for every Python on one platform"
    library = LIBRARY_OF_PLATFORM[match[1]]
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    found = [name for name in names if name.endswith((".so", ".dylib", ".dll")) or ".so." in name]
    assert found == ([library] if library else []), found
    assert "fused_mha/py.typed" in names, names
    assert "fused_mha/benchmark/fma_peak.c" in names, names  # which the benchmark compiles
    ours = ("fused_mha/", "pytest_fused_mha/", f"fused_mha-{version}.dist-info/")
    assert "pytest_fused_mha/__init__.py" in names, names  # which pytest loads by its entry point
    others = [name for name in names if not name.startswith(ours)]
    unwanted = [name for name in names if "csrc" in name or "__pycache__" in name]
    assert not others + unwanted, others + unwanted
    return library


def check_sources(path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    known = listed.rstrip("\0").split("\0")
    wanted = {name for name in known if not name.startswith(NOT_IN_THE_SOURCES)} | {"PKG-INFO"}
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert found == wanted, f"too much: {sorted(found - wanted)}; too little: {sorted(wanted - found)}"


if __name__ == "__main__":
    main()

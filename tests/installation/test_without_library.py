"""What a user without a C++ compiler gets: the pure-Python package."""

import shutil
import subprocess
import sys
from pathlib import Path

import fused_mha

# sys.path before the finders of editable installations.
IMPORT_FROM = """
import importlib.machinery, runpy, sys
sys.meta_path.insert(0, importlib.machinery.PathFinder)
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[2])
"""


def test_installation_without_the_library_says_so_once_and_agrees_with_torch(tmp_path):
    package = Path(fused_mha.__file__).parent
    shutil.copytree(package, tmp_path / "fused_mha", ignore=shutil.ignore_patterns("*.so", "*.dylib", "csrc"))
    script = Path(__file__).with_name("without_library.py")
    command = [sys.executable, "-c", IMPORT_FROM, str(tmp_path), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "installed without its C++ library" in done.stdout
    assert "GCC 11, Clang 14 or newer" in done.stdout
    assert "pip install --force-reinstall --no-deps --no-cache-dir" in done.stdout

"""`python -m fused_mha` names the commands of the package."""

import re
import subprocess
import sys
from pathlib import Path

import fused_mha

PACKAGE = Path(fused_mha.__file__).parent


def test_names_every_command():
    done = subprocess.run([sys.executable, "-m", "fused_mha"], capture_output=True, text=True, check=True, timeout=60)
    named = re.findall(r"^python -m fused_mha\.(\w+)", done.stdout, re.MULTILINE)
    files = [path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
    packages = [path.parent.name for path in PACKAGE.glob("*/__main__.py")]
    assert sorted([*named, "__main__"]) == sorted(files + packages)

"""Builds the NVIDIA libraries that a CUDA build of torch links, of functions that do nothing; `host_time` calls it.

`driver.c` and `runtime.c` have the functions that must give something back. Every other symbol that torch's own
libraries want returns 0.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
_OF_NVIDIA = re.compile(r"(cuda|cublas|cudnn|cufft|cuFile|cupti|curand|cusolver|cusparse|__cuda|nccl|nvrtc|nvshmem)")
_LIBRARIES = re.compile(r"lib(cu|nccl|nvrtc|nvshmem)")
_DEFINED = re.compile(r"^[a-z][\w ]*?\**\s?\**(\w+)\(", re.MULTILINE)


def build(torch_libraries: Path, folder: Path, compiler: str = "cc") -> None:
    """Compile them into a folder, which `LD_LIBRARY_PATH` has to name.

    Args:
        torch_libraries: the folder `lib` of torch.
        folder: where they go.
        compiler: of C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    linked, wanted = set[str](), defaultdict[str, set[str]](set)  # symbols by version, which is a library's name
    own = {path.name for path in torch_libraries.glob("*.so")}
    for name in own:
        path = torch_libraries / name
        linked |= set(re.findall(r"NEEDED\).*\[(.*)\]", _printed("readelf", "-d", path)))
        for line in _printed("nm", "-D", "--undefined-only", path).splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            if _OF_NVIDIA.match(symbol):
                wanted[version].add(symbol)
    defined = set(_DEFINED.findall((HERE / "runtime.c").read_text()))
    _compile(compiler, folder / "libcuda.so.1", [HERE / "driver.c"])
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to("libcuda.so.1")  # where Triton looks
    for library in sorted(name for name in linked - own if _LIBRARIES.match(name) and name != "libcuda.so.1"):
        stem = library.partition(".")[0]
        prefix = "NVSHMEM" if stem.startswith("libnvshmem") else f"{stem}."
        version = next((name for name in wanted if name.startswith(prefix)), "")
        symbols = wanted[version] if version else set[str]()
        if stem == "libcudart":  # of libraries that version no symbol
            symbols = symbols | wanted[""]
        source = folder / f"{stem}.c"
        source.write_text("".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in sorted(symbols - defined)))
        options = [f"-Wl,-soname,{library}", "-ldl"]
        if version:
            script = folder / f"{stem}.map"
            script.write_text(f"{version} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={script}")
        _compile(compiler, folder / library, [source, HERE / "runtime.c"], options)


def _compile(compiler: str, library: Path, sources: list[Path], options: list[str] | None = None) -> None:
    command = [compiler, "-w", "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", library, *sources, *(options or [])]
    subprocess.run(command, check=True)


def _printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

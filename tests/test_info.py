"""`python -m fused_mha.info`: what a bug report needs."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fused_mha import info
from fused_mha.backends import cpu
from fused_mha.core import dispatch


def rows(out):
    return dict(re.split(r" +", line, maxsplit=1) for line in out.splitlines() if not line.startswith((" ", "back")))


def test_names_versions_and_platform(capsys):
    info.main()
    found = rows(capsys.readouterr().out)
    assert found["fused_mha"] == version("fused-mha")
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["platform"] == platform.platform()
    assert found["cpu"].endswith(f", torch uses {torch.backends.cpu.get_cpu_capability()}")
    assert platform.machine() in found["cpu"]
    assert found["devices"].split(", ")[0] == "cpu"


@pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no C++ library")
@pytest.mark.parametrize(
    ("isa", "tiles", "text"),
    [
        ("avx2", (), "none (AMX)"),
        ("avx512_bf16", (torch.bfloat16,), "AMX: torch's kernels get bfloat16"),
        ("avx512_amx", (), "AMX, for bfloat16"),
    ],
)
def test_names_the_processor_and_whose_its_tiles_are(isa, tiles, text, capsys, monkeypatch):
    monkeypatch.setattr(cpu.LIBRARY, "isa", isa)
    monkeypatch.setattr(cpu.LIBRARY, "cpu_name", "A processor")
    monkeypatch.setattr(cpu.LIBRARY, "tile_dtypes", tiles)
    info.main()
    found = rows(capsys.readouterr().out)
    assert found["cpu"].startswith(f"A processor ({platform.machine()})")
    assert found["tiles"].startswith(text)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists what the processor has")
def test_the_library_names_the_processor_as_linux_does():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    if cpu.LIBRARY is None or "model name" not in cpuinfo:
        pytest.skip("no C++ library, or a processor without a name")
    assert cpu.LIBRARY.cpu_name.strip() == re.search(r"model name\s*: (.*)", cpuinfo)[1].strip()
    used = (torch.bfloat16,) if cpu.LIBRARY.isa == "avx512_amx" else ()
    for dtype, flag in ((torch.bfloat16, "amx_bf16"), (torch.float16, "amx_fp16")):
        assert (dtype in (*used, *cpu.LIBRARY.tile_dtypes)) == bool(re.search(rf"\b{flag}\b", cpuinfo))


def test_names_the_number_of_threads(capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        info.main()
    finally:
        torch.set_num_threads(threads)
    assert rows(capsys.readouterr().out)["threads"] == "3"


def test_lists_back_ends_in_order_of_preference(capsys):
    info.main()
    listed = capsys.readouterr().out.split("back ends, in order of preference:\n")[1].splitlines()
    assert [line.split(maxsplit=1) for line in listed] == [[b.name, b.summary] for b in dispatch.BACKENDS]


def back_ends(out):
    return dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))


def run_as_a_command(**variables):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_mha.info"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | variables,
    )
    assert run.stderr == ""
    return run.stdout


def test_names_the_instruction_set_of_the_fused_core(capsys):
    info.main()
    assert back_ends(capsys.readouterr().out)["cpu"] == f"the fused core in C++, instruction set {cpu.LIBRARY.isa}"


def test_names_the_instruction_set_that_the_environment_asks_for():
    isa = cpu.LIBRARY.available_isas[0]
    out = run_as_a_command(FUSED_MHA_ISA=isa)
    assert back_ends(out)["cpu"] == f"the fused core in C++, instruction set {isa}"


def test_help_prints_no_info(capsys):
    with pytest.raises(SystemExit, match="0"):
        info.main(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m fused_mha.info")
    assert torch.__version__ not in out


def test_runs_as_a_command():
    assert rows(run_as_a_command())["fused_mha"] == version("fused-mha")

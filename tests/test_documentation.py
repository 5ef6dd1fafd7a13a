"""The README and the pages of docs/: their Python runs, their links lead somewhere, their figures are recorded.

What `mkdocs build --strict` checks of the pages, CI checks by that command.
"""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import fused_mha
import fused_mha.parallel
import fused_mha.testing

PROJECT = Path(__file__).parents[1]
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("**/*.md"))]
RESULTS = PROJECT / "benchmarks" / "results"

FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The language and the code of each block of a page, with the line where the code begins."""
    text = page.read_text()
    return [(block[2], block[3], text.count("\n", 0, block.start(3))) for block in FENCE.finditer(text)]


def code_of(page):
    return [(code, line) for language, code, line in blocks(page) if language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    if page.name == "transformers.md":
        pytest.importorskip("transformers", reason="transformers is not installed; the extra `transformers` has it")
    if page.name == "export.md":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed; the extra `onnx` has it")
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    for code, line in code_of(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_python_is_left_out_by_another_name(page):
    languages = {language for language, _, _ in blocks(page)}
    assert languages <= {"", "python", "mermaid", "yaml"}
    assert not [code for language, code, _ in blocks(page) if not language and re.search(r"^import |^>>>", code, re.M)]


def test_the_readme_takes_two_minutes():
    assert len(README.read_text().splitlines()) <= 120


def test_the_readme_links_to_what_is_there():
    targets = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert targets
    assert not [target for target in targets if not target.startswith("https:") and not (PROJECT / target).exists()]


@pytest.mark.parametrize("page", [*PAGES, PROJECT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_a_file_that_a_page_names_is_there(page):
    named = re.findall(r"`((?:benchmarks|docs|examples|src|tests)/[\w./-]+)`", page.read_text())
    assert not [path for path in named if not (PROJECT / path).exists()]


def test_every_picture_is_drawn_by_the_script_and_shown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib, of the extra `bench`")
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    runpy.run_path(str(PROJECT / "docs" / "pictures.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()} | {"attention_map.png"}  # by examples/attention_map.py
    shown = {name for page in PAGES for name in re.findall(r"\]\((?:docs/)?pictures/([^)]+)\)", page.read_text())}
    assert drawn == shown == {path.name for path in (PROJECT / "docs" / "pictures").iterdir()}


CUDA_GROUPS = (
    "module, training step",
    "module, inference",
    "small module, training step",
    "small module, inference",
    "padding, forward and backward",
    "causal and padding, forward and backward",
    "causal mask as a tensor, forward and backward",
    "float mask, forward and backward",
    "dropout, forward and backward",
    "own kernels, forward",
    "own kernels, forward and backward",
)


@pytest.mark.parametrize(
    ("heading", "results", "names"),
    [
        ("AMD EPYC: the module", "amd_epyc_avx512_bf16/module.json", None),
        ("AMD EPYC: the attention core", "amd_epyc_avx512_bf16/attention.json", None),
        ("Intel Xeon, 2 cores: the module", "intel_xeon_avx512_amx/module.json", None),
        ("Intel Xeon without AMX: bf16, module", "intel_xeon_avx512/module_bf16.json", None),
        ("Intel Xeon without AMX: bf16, attention alone", "intel_xeon_avx512/attention_bf16.json", None),
        (
            "Intel Xeon without AMX: autocast to bf16",
            "intel_xeon_avx512/module_autocast.json",
            ("autocast inference",),
        ),
        ("Intel Xeon, 2 cores: scaled_dot_product_attention", "intel_xeon_avx512_amx/sdpa.json", None),
        ("Intel Xeon, 2 cores: softcap, sinks and ALiBi", "intel_xeon_avx512_amx/options.json", None),
        (
            "Intel Xeon, 2 cores: models of transformers",
            "intel_xeon_avx512_amx/transformers.json",
            ("prefill", "training step"),
        ),
        ("Intel Xeon, 2 cores: decoding", "intel_xeon_avx512_amx/decoding.json", None),
        ("Intel Xeon, 2 cores: ragged batches", "intel_xeon_avx512_amx/ragged.json", None),
        ("Intel Xeon, 2 cores: rotary positions and Q/K norm", "intel_xeon_avx512_amx/rotary.json", None),
        ("NVIDIA H100", "nvidia_h100/cuda.json", CUDA_GROUPS),
    ],
)
def test_a_table_of_figures_has_those_that_were_recorded(heading, results, names):
    groups = {group["name"]: group for group in json.loads((RESULTS / results).read_text())["groups"]}
    section = (PROJECT / "docs" / "performance.md").read_text().split(f"\n## {heading}\n")[1]
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\|.*?\| ([\d.]+) \| ([\d.]+) \|", section, re.MULTILINE)
    recorded = [groups[name] for name in names or groups]
    assert rows == [(f"{group['geometric_mean']:.2f}", f"{group['lowest']:.2f}") for group in recorded]


@pytest.mark.parametrize(
    ("results", "name"),
    [
        ("amd_epyc_avx512_bf16/module.json", "fp32 inference"),
        ("amd_epyc_avx512_bf16/module.json", "fp32 training step"),
        ("amd_epyc_avx512_bf16/module.json", "fp32 inference, AVX2"),
        *(
            ("intel_xeon_avx512_amx/options.json", f"{option}, fp32 forward, against torch")
            for option in ("softcap", "sinks", "ALiBi")
        ),
        *(("intel_xeon_avx512_amx/module.json", name) for name in ("fp32 inference", "bf16 training step")),
        *(("intel_xeon_avx512/module_bf16.json", name) for name in ("bf16 inference", "bf16 training step")),
        ("nvidia_h100/cuda.json", "module, training step"),
        ("nvidia_h100/cuda.json", "dropout, forward and backward"),
    ],
)
def test_the_readme_has_the_figures_that_were_recorded(results, name):
    (group,) = (x for x in json.loads((RESULTS / results).read_text())["groups"] if x["name"] == name)
    figure = re.escape(f"{group['geometric_mean']:.2f} [{group['lowest']:.2f}]")
    assert re.search(rf"[|;] {figure}(;| \|)", README.read_text())


def test_a_row_of_random_calls_has_what_was_recorded():
    page = (PROJECT / "docs" / "performance.md").read_text()
    rows = re.findall(
        r"^\| (\d+) random calls, \w+ threads?; ([\d.]+) % are slower than torch \| ([\d.]+) \| ([\d.]+) \|"
        r".*--seed (\d+) --calls (\d+) --threads (\d+)`",
        page,
        re.M,
    )
    recorded = []
    for path in (RESULTS / "intel_xeon_2_cores").glob("random_seed_*.txt"):
        text = path.read_text()
        seed, threads = re.fullmatch(r"random_seed_(\d+)_(\d+)_threads?", path.stem).groups()
        ratios = re.findall(r"^([\d.]+)x ", text, re.M)
        slower, mean = re.search(r"slower than torch: ([\d.]+)%", text)[1], re.search(r"mean ([\d.]+)x", text)[1]
        recorded.append((str(len(ratios)), slower, mean, min(ratios, key=float), seed, str(len(ratios)), threads))
    assert sorted(rows) == sorted(recorded)


def test_the_reference_has_everything_that_is_public():
    page = (PROJECT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^::: fused_mha\.(\S+)$", page, re.MULTILINE))
    documented -= {"testing.strategies"}  # all of the file, which is no part of fused_mha.testing
    public = {*fused_mha.__all__, *(f"testing.{name}" for name in fused_mha.testing.__all__)}
    public |= {f"parallel.{name}" for name in fused_mha.parallel.__all__}
    # Imported by its own name, since transformers is an extra.
    public |= {f"integrations.transformers.{name}" for name in ("cache", "register")}
    assert documented == public


def test_the_citation_and_the_readme_are_of_this_version():
    assert f"\nversion: {fused_mha.__version__}\n" in (PROJECT / "CITATION.cff").read_text()
    assert f"\n- **Version**: {fused_mha.__version__}, " in README.read_text()

"""Results go into the folder of their processor and number of threads."""

import pytest
import torch

from fused_mha.benchmark import processor

import run


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC", "amd_epyc"),
        ("AMD EPYC 9B45 128-Core Processor", "amd_epyc_9b45"),
        ("Intel(R) Xeon(R) Processor @ 2.60GHz", "intel_xeon"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "intel_core_i7_8650u"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100"),
    ],
)
def test_a_slug_leaves_out_what_tells_nothing(name, slug):
    assert processor.slug(name) == slug


def test_the_folder_names_the_processor_and_the_instruction_set(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    monkeypatch.setattr(processor, "isa", lambda: "avx512_bf16")
    assert processor.folder("module") == "amd_epyc_avx512_bf16"


def test_only_the_benchmark_of_cuda_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert processor.folder("cuda") == "nvidia_h100"
    assert processor.device("module") == processor.cpu_name()


def test_a_file_names_the_seed_and_an_unusual_number_of_threads(monkeypatch):
    ran = []
    monkeypatch.setattr(run, "_run", lambda name, stem, options: ran.append((stem, options.out)) or 0)
    monkeypatch.setattr(processor, "folder", lambda name: "amd_epyc_avx512_bf16")
    usual = torch.get_num_threads()
    try:
        run.main(["module", "random", "--seed", "4"])
        run.main(["module", "--threads", str(usual + 1)])
    finally:
        torch.set_num_threads(usual)
    folder = run.HERE / "results" / "amd_epyc_avx512_bf16"
    assert ran == [
        ("module", folder),
        ("random_seed_4", folder),
        (f"module_{usual + 1}_threads", folder),
    ]

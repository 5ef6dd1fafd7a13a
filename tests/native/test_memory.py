"""What the kernels read, write and allocate."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from attention_oracle import make_arguments, run_with_gradients
from fused_mha.testing.tolerances import tolerance
from native.dense_oracle import dense_attention, native_attention

TESTS = Path(__file__).parents[1]
PER_HEAD = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
LARGE = {"N": 1, "L": 1024, "S": 1024, "H": 8, "H_kv": 8, "D": 32, "D_v": 32}
CASES = {
    "averaged weights": {"need_weights": True},
    "weights of a head": {"weights_of_heads": (1,)},
    "causal": {"is_causal": True, "return_lse": True},
    "masks": {"mask_dtype": torch.bool, "padding_dtype": torch.bool, "need_weights": True},
    "float mask": {"mask_dtype": torch.float32, "padding_dtype": torch.float32, "need_weights": True},
    "dropout": {"dropout_p": 0.1, "need_weights": True},
}


def run_script(*arguments, timeout=120):
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("guarded_calls.py"))
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def test_calls_touch_no_byte_outside_their_tensors(isa):
    done = run_script(isa)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert done.stdout.endswith("all calls kept to their memory\n")


def test_the_guard_itself_catches_one_byte():
    assert run_script("overrun").returncode < 0


def allocations(function):
    """Sizes in bytes of what torch's allocator gave out meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_all_scores_is_allocated(case, dtype, set_num_threads):
    set_num_threads(1)
    arguments = make_arguments(dtype=dtype, **LARGE, **case)
    sizes = allocations(lambda: run_with_gradients(native_attention, arguments))
    scores = LARGE["N"] * LARGE["H"] * LARGE["L"] * LARGE["S"]
    assert max(sizes) < scores  # not even one byte for each
    if dtype == torch.float32:
        inputs = [x.numel() * 4 for x in arguments.values() if isinstance(x, torch.Tensor)]
        assert max(sizes) <= max(*inputs, LARGE["L"] * LARGE["S"] * 4)


def test_the_allocations_show_a_tensor_of_all_scores_where_there_is_one():
    arguments = make_arguments(**LARGE)
    scores = LARGE["N"] * LARGE["H"] * LARGE["L"] * LARGE["S"]
    assert max(allocations(lambda: dense_attention(**arguments, need_weights=True))) >= scores


@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}], ids=["output", "weights"])
def test_workspaces_do_not_grow_with_the_number_of_queries(wanted, set_num_threads):
    set_num_threads(1)

    def largest(L):
        query, keys = torch.randn(1, L, 2, 16), torch.randn(1, 64, 2, 16)
        results = {L * 2 * 16 * 4, L * 64 * 4, L * 2 * 4, 2 * L * 2 * 4}  # output, weights, lse and stats
        sizes = allocations(lambda: native_attention(query=query, key=keys, value=keys, **wanted))
        return max(size for size in sizes if size not in results)

    assert largest(16384) == largest(8192)


def test_the_library_takes_no_memory_of_its_own():
    """The peak of the process' memory, which sees what torch's allocator does not."""
    code = """
import resource, torch, fused_mha
torch.set_num_threads(1)
def call(L):
    x = torch.randn(1, L, 16, 16, requires_grad=True)
    with fused_mha.backend("cpu"):
        result = fused_mha.attention(x, x, x, need_weights=True)
    torch.autograd.grad([result.output, result.weights], x, [result.output.detach(), result.weights.detach()])
call(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    scores = 16 * 1024 * 1024 * 4
    assert int(done.stdout) * unit < scores / 2


@pytest.fixture(params=[(float("nan"), 0xFF), (float("inf"), 0x7F), (3.0, 0xA5)], ids=["nan", "inf", "numbers"])
def garbage(request, monkeypatch):
    """Switches the filling of all new memory with garbage on."""
    floating, byte = request.param
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def filled(x):
        return x.fill_(floating) if x.is_floating_point() else x.fill_(byte)

    def switch_on():
        monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))

    return switch_on


@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}, PER_HEAD], ids=["output", "averaged", "everything"])
def test_results_do_not_depend_on_what_new_memory_holds(base_isa, garbage, wanted):
    masks = {"mask_dtype": torch.float32, "padding_dtype": torch.float32, "bias_kv": True, "add_zero_attn": True}
    arguments = make_arguments(L=30, S=90, D=17, D_v=9, hidden=0.6, **masks, **wanted)
    expected = run_with_gradients(native_attention, arguments)
    garbage()
    results = run_with_gradients(native_attention, arguments)
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


def test_a_view_of_huge_strides_and_one_element_each_is_served(base_isa):
    x = torch.as_strided(torch.randn(40), (1, 3, 2, 5), (10**15, 11, 6, 1))
    y = torch.as_strided(torch.randn(40), (1, 3, 1, 5), (10**15, 11, 10**17, 1))
    output = native_attention(query=x, key=y, value=y).output
    exact = dense_attention(query=x.double(), key=y.double(), value=y.double()).output
    assert (output - exact).abs().max().item() <= tolerance(torch.float32, 0.0, exact.abs().max().item())


def mapping_flags(address):
    """The kernel's flags of the mapping that holds an address."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            first, last = (int(bound, 16) for bound in key.split("-"))
            holds = first <= address < last
        elif holds and key == "VmFlags:":
            return values
    return []


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mappings")
def test_large_results_are_advised_to_lie_in_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    query = torch.randn(1, 1536, 1, 16)  # weights of 9 MiB
    result = native_attention(query=query, key=query, value=query, need_weights=True)
    assert "hg" in mapping_flags(result.weights.data_ptr() + result.weights.nbytes // 2)
    untouched = torch.frombuffer(mmap.mmap(-1, result.weights.nbytes), dtype=torch.uint8)
    assert "hg" not in mapping_flags(untouched.data_ptr() + untouched.nbytes // 2)

"""Calls by Triton's own compiler and launcher, with a driver that does nothing; `test_without_gpu` runs it by itself.

It is given a JSON list of steps, each calls of `attention` ({"calls": [...]}), of `varlen_attention` ({"packed":
[...]}), of a module ({"modules": [...]}) or of `warm_up` ({"warm_up": [...]}), and prints how many kernels each step
compiled, how many it took from disk, and how many variants the process has.
"""

from __future__ import annotations

import json
import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

import fused_mha
from fused_mha.backends import cpu, triton
from fused_mha.backends.triton import assembler, launch, preparation
from fused_mha.backends.triton.entry import entry
from fused_mha.core import dispatch, plans
from fused_mha.module import one_call


class WithoutGPU(CudaDriver):
    """Device 0, an sm_90, on which tensors of the CPU lie."""

    def __init__(self):
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0

    def get_device_capability(self, *_):
        return (9, 0)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def stand_in():
    """Tensors of the CPU are served as those of a GPU."""
    driver.set_active(WithoutGPU())
    served = {"served": triton.BACKEND.served, "serves_module": triton.BACKEND.serves_module}
    serves = cpu.BACKEND._replace(**served, leaves=lambda _: None)
    one_call.forward = lambda *_, **__: None  # of the CPU
    dispatch.BACKENDS = (serves, *dispatch.BACKENDS[1:])
    cpu._forward, cpu._backward = launch.attention, launch.attention_backward
    plans.DEVICE = "cpu"
    preparation._shared_memory = lambda _: 227 << 10
    assembler.of_device = lambda _: assembler.Assembler(None, True, "Triton's")


def attend(N=2, L=32, S=32, H=4, D=16, layout="contiguous", backward=True, **flags):
    """One call; `layout` is how queries lie."""

    def draw(length):
        if layout == "packed":  # as a module's projection gives them
            return torch.zeros(N, length, 3 * H * D, dtype=torch.float16)[..., : H * D].view(N, length, H, D)
        if layout == "heads first":
            return torch.zeros(N, H, length, D, dtype=torch.float16).transpose(1, 2)
        if layout == "odd":  # strides that 16 bytes do not divide
            return torch.zeros(N, length, H, D + 3, dtype=torch.float16)[..., :D]
        return torch.zeros(N, length, H, D, dtype=torch.float16)

    for name in flags.pop("of_heads", ()):
        flags[name] = torch.zeros(H)
    if flags.pop("padding", False):
        flags["key_padding_mask"] = torch.zeros(N, S, dtype=torch.bool)
    leaves = [draw(length).requires_grad_(backward) for length in (L, S, S)]
    output = fused_mha.attention(*leaves, **flags).output
    if backward:
        torch.autograd.grad(output, leaves, torch.zeros_like(output))


def attend_packed(sequences, tokens=32, H=4, D=16, **flags):
    """One call of packed sequences and its backward."""
    leaves = [torch.zeros(tokens, H, D, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    offsets = torch.zeros(sequences + 1, dtype=torch.int64)
    output = fused_mha.varlen_attention(*leaves, offsets, offsets, **flags).output
    torch.autograd.grad(output, leaves, torch.zeros_like(output))


def call_module(N, L, E, num_heads, batch_first, backward):
    """One call of a module, with padding."""
    module = fused_mha.MultiHeadAttention(E, num_heads, batch_first=batch_first, dtype=torch.float16)
    x = torch.zeros((N, L, E) if batch_first else (L, N, E), dtype=torch.float16)
    with torch.set_grad_enabled(backward):
        output, _ = module(x, x, x, key_padding_mask=torch.zeros(N, L, dtype=torch.bool), need_weights=False)
        if backward:
            output.sum().backward()


def main(steps):
    """A list of [compiled, taken from disk, variants]."""
    stand_in()
    found = {True: 0, False: 0}

    def listen(*, cache_hit, **_):
        found[cache_hit] += 1

    knobs.compilation.listener = listen
    results = []
    for step in steps:
        found.update({True: 0, False: 0})
        for call in step.get("calls", ()):
            attend(**call)
        for call in step.get("packed", ()):
            attend_packed(**call)
        for call in step.get("modules", ()):
            call_module(**call)
        for sizes, calls, backward in step.get("warm_up", ()):
            typed = [{name: getattr(torch, str(x), x) for name, x in call.items()} for call in calls]
            fused_mha.warm_up(sizes, calls=typed, dtype=torch.float16, device="cpu", backward=backward)
        results.append([found[False], found[True], sum(len(kept[0]) for kept in entry.device_caches.values())])
    return results


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

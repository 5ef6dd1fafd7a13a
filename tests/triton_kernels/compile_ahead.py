"""Compiles the Triton kernels of some calls for GPUs that need not be there; `test_compilation` runs it by itself.

It is given a JSON list of calls and prints a list for each: of its kernels the name, the registers, and the bytes of
stack and of shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_mha.backends.triton import launch
from fused_mha.ops.schema import Arguments

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes that a block may have
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def describe(x, path, constants, attributes):
    """The type of an argument, as Triton tells it when it is launched; fills the other two."""
    if isinstance(x, tuple):
        return type(x)(*(describe(field, (*path, i), constants, attributes) for i, field in enumerate(x)))
    if x is None or (isinstance(x, int) and x == 1):
        constants[path] = x
        return "constexpr"
    if isinstance(x, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[x.dtype]
    if isinstance(x, int) and x % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if isinstance(x, int) else "fp32"


def compiled(kernel, arguments, how, architecture):
    """What a kernel takes of the chip."""
    constants, attributes, signature = {}, {}, {}
    for i, (parameter, x) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr:
            constants[i,] = x
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe(x, (i,), constants, attributes)
    result = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": how.num_warps, "num_stages": how.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "name": kernel.fn.__name__,
        "registers": int(registers),
        "stack": int(stack),
        "shared": result.metadata.shared,
    }


def kernels(architecture, dtype, D, N=8, H=12, masks=None, padding=False, dropout=False, virtual=False, weights=False):
    """All kernels of one call and its backward."""
    L = S = 512
    found = []
    launch._shared_memory = lambda _: SHARED_MEMORY[architecture]
    launch._run = lambda kernel, _, how, *arguments: found.append(compiled(kernel, arguments, how, architecture))

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    bias = empty(H, D) if virtual else None
    arguments = Arguments(
        *(empty(N, length, H, D) for length in (L, S, S)),
        None if masks is None else empty(N, 1, L, S, dtype=getattr(torch, masks)),
        empty(N, S, dtype=torch.bool) if padding else None,
        bias,
        bias,
        empty(2, dtype=torch.int64) if dropout else None,
        None,
        0 if padding else None,
        virtual,
        0.1 if dropout else 0.0,
        D**-0.5,
        weights,
        True,
    )
    output, returned, lse, stats = launch.attention(*arguments)
    through = (output, returned if weights else None, lse if weights else None)
    mask_grad = masks is not None and masks != "bool"
    launch.attention_gradients(*through, output, stats, mask_grad, weights, *arguments)
    return found


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    print(json.dumps([kernels(**case | {"dtype": getattr(torch, case["dtype"])}) for case in cases]))

"""Compiles the Triton kernels of some calls for GPUs that need not be there; `test_compilation` runs it by itself.

It is given a JSON list of calls and prints a list for each: of its kernels the name, the registers, the bytes of stack
and of shared memory, and the reads of registers that nothing has set. After `variants`, it compiles nothing and prints
how many variants of each kernel Triton would compile for all the calls.
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
from sass import disassembled, reads_of_nothing
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fused_mha.backends.triton import assembler, launch, launcher, preparation
from fused_mha.backends.triton.entry import entry
from fused_mha.backends.triton.tiles import TENSORS
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
        fields = [describe(field, (*path, i), constants, attributes) for i, field in enumerate(x)]
        return type(x)(*fields) if hasattr(x, "_fields") else tuple(fields)
    if x is None:
        constants[path] = None
        return "constexpr"
    if isinstance(x, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[x.dtype]
    return "i32" if isinstance(x, int) else "fp32"  # which `entry` is not specialized by


def compiled(kernel, call, operands, tile, how, architecture, made_by):
    """What a kernel takes of the chip."""
    constants, attributes, signature = {}, {}, {}
    arguments = (kernel, call[:TENSORS], operands, *call[TENSORS:], tile)
    for i, (parameter, x) in enumerate(zip(entry.params, arguments, strict=True)):
        if parameter.is_constexpr:
            constants[i,] = x
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = describe(x, (i,), constants, attributes)
    with assembler.used(made_by) as options:
        result = triton.compile(
            ASTSource(entry, signature, constants, attributes),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": how.num_warps, "num_stages": how.num_stages, **options},
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "name": result.name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": result.metadata.shared,
        # The assembler's fault is one of Hopper's code.
        "reads of nothing": reads_of_nothing(disassembled(result.asm["cubin"])) if architecture >= 90 else [],
    }


def variants(calls):
    """How many of each kernel Triton would compile, by what it looks at of the arguments."""
    bind = create_function_from_signature(entry.signature, entry.params, make_backend(GPUTarget("cuda", 90, 32)))
    found = {}

    def note(kernel, call, operands, tile, how, *_):
        _, looked_at, _ = bind(kernel, call[:TENSORS], *call[TENSORS:], operands, tile)
        found.setdefault(kernel.fn.__name__, set()).add(str((looked_at, how)))

    for call in calls:
        kernels(**call, compile_one=note)
    return {name: len(kinds) for name, kinds in found.items()}


def kernels(
    architecture,
    dtype,
    D,
    D_v=None,
    N=8,
    H=12,
    H_kv=None,
    L=512,
    S=512,
    masks=None,
    padding=False,
    dropout=False,
    virtual=False,
    weights=False,
    weights_of_heads=(),
    softcap=None,
    of_heads=(),
    packed=False,
    newer_assembler=True,
    compile_one=compiled,
):
    """All kernels of one call and its backward; if packed, of N sequences of about these lengths."""
    D_v, H_kv = D_v or D, H_kv or H
    sequences = N
    if packed:
        N, L, S = 1, N * L, N * S
    found = []
    made_by = assembler.choice(architecture // 10)
    if not newer_assembler:
        made_by = assembler.Assembler(None, False, "Triton's")
    preparation._shared_memory = lambda _: SHARED_MEMORY[architecture]
    preparation._assembler_is_right = lambda _: made_by.is_right
    launcher.run = lambda kernel, _, how, call, *operands: found.append(
        compile_one(kernel, call, operands[:-1], operands[-1], how, architecture, made_by)
    )

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments = Arguments(
        empty(N, L, H, D),
        empty(N, S, H_kv, D),
        empty(N, S, H_kv, D_v),
        None if masks is None else empty(N, 1, L, S, dtype=getattr(torch, masks)),
        empty(N, S, dtype=torch.bool) if padding else None,
        empty(H_kv, D) if virtual else None,
        empty(H_kv, D_v) if virtual else None,
        empty(2, dtype=torch.int64) if dropout else None,
        *(empty(H, dtype=torch.float32) if name in of_heads else None for name in ("sinks", "alibi_slopes")),
        *((empty(sequences + 1, dtype=torch.int64) if packed else None,) * 2),
        None,
        0 if padding else None,
        packed,
        virtual,
        0.1 if dropout else 0.0,
        D**-0.5,
        softcap,
        weights,
        not weights_of_heads,
        weights_of_heads,
    )
    output, returned, lse, stats = launch.attention(*arguments)
    through = (output, returned if weights else None, lse if weights or packed else None)
    mask_grad = masks is not None and masks != "bool"
    launch.attention_gradients(*through, output, stats, mask_grad, weights or packed, *arguments)
    return found


if __name__ == "__main__":
    cases = [case | {"dtype": getattr(torch, case["dtype"])} for case in json.loads(sys.argv[-1])]
    print(json.dumps(variants(cases) if "variants" in sys.argv else [kernels(**case) for case in cases]))

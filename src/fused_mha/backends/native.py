"""The CPU library: finds it, checks it, and calls its C functions on tensors. `backends.cpu` calls this.

The library is a plain C-ABI one (`csrc/c_api.h`), built without torch. Its threads are torch's: it is given the address
of `torch_parallel_for` in torch's own library.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops.schema import Arguments

ABI_VERSION = 2
ISA_VARIABLE = "FUSED_MHA_ISA"
NAMES = ("libfused_mha.so", "libfused_mha.dylib")

DTYPES = {  # as `enum fused_mha_dtype` numbers them
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.int64: 5,
    torch.uint8: 6,
}
_UNKNOWN = -1
FAR = 1 << 60  # a key position that no query has
_NOTHING = torch.empty(0, device="cpu")

_TENSOR = "3q4q4q"
_ABSENT = (0,) * 11
_SHARED_TENSORS = 10
_WORKSPACE = struct.Struct(f"={_TENSOR}")
_WORKSPACE_OFFSET = _WORKSPACE.size * (_SHARED_TENSORS - 1)
_FORWARD = struct.Struct(f"={_TENSOR * _SHARED_TENSORS}5q2d{_TENSOR * 3}")
_BACKWARD = struct.Struct(f"={_TENSOR * _SHARED_TENSORS}5q2d{_TENSOR * 11}")
_PRODUCT = struct.Struct(f"={_TENSOR * 5}3q")
_PRODUCT_WORKSPACE_OFFSET = _WORKSPACE.size * 4


class Library:
    """The loaded library; raises RuntimeError where it does not fit this package or the machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        version = getattr(self._c, "fused_mha_abi_version", None)
        if version is None or version() != ABI_VERSION:
            raise RuntimeError(
                f"{path} has ABI version {None if version is None else version()}, this package needs {ABI_VERSION}: "
                "it is of another version of fused_mha. Reinstall the package."
            )
        for name in ("fused_mha_last_error", "fused_mha_available_isa", "fused_mha_isa", "fused_mha_cpu_vendor"):
            getattr(self._c, name).restype = ctypes.c_char_p
        computations = ("forward", "backward", "product")
        names = (*computations, *(f"{name}_workspace" for name in computations), "dropout_mask", "set_isa", "exp2")
        self._functions = {name: getattr(self._c, f"fused_mha_{name}") for name in names}
        for function in self._functions.values():
            function.restype = ctypes.c_int64
        self._c.fused_mha_set_parallel_for(ctypes.c_void_p(_torch_parallel_for()))
        self.cpu_vendor: str = self._c.fused_mha_cpu_vendor().decode()  # as CPUID gives it, such as AuthenticAMD
        self.isa: str = self._c.fused_mha_isa().decode()  # the instruction set in use
        if wanted := os.environ.get(ISA_VARIABLE):
            self.set_isa(wanted)

    @property
    def available_isas(self) -> list[str]:
        """The compiled instruction sets that this machine runs, the best one last."""
        names = []
        while (name := self._c.fused_mha_available_isa(ctypes.c_int64(len(names)))) is not None:
            names.append(name.decode())
        return names

    def set_isa(self, name: str) -> None:
        """Use an instruction set from now on; RuntimeError if there is no such."""
        if self._functions["set_isa"](name.encode()) != 0:
            raise RuntimeError(
                f"{ISA_VARIABLE} must be one of {', '.join(self.available_isas)}, which this installation has for this "
                f"machine; got {name!r}"
            )
        self.isa = name

    def forward(
        self, arguments: Arguments, return_lse: bool, return_stats: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, weights, log-sum-exp and the statistics that backward needs; empty what is not asked for."""
        query = arguments.query
        N, L, H, _ = query.shape
        dtype = arguments.accumulator_dtype
        output = query.new_empty((N, L, H, arguments.value.shape[3]))
        weights = query.new_empty(arguments.weights_shape) if arguments.need_weights else None
        lse = query.new_empty((N, H, L), dtype=dtype) if return_lse else None
        stats = query.new_empty((2, N, H, L), dtype=dtype) if return_stats else None
        self._call("forward", _FORWARD, arguments, stats, (output, weights, lse))
        empty = output.new_empty((0,)) if return_stats else _NOTHING  # an operator may not return one tensor twice
        weights, lse, stats = (empty if x is None else x for x in (weights, lse, stats))
        return output, weights, lse, stats

    def backward(
        self,
        arguments: Arguments,
        output: Tensor,
        stats: Tensor,
        grad_output: Tensor,
        grad_weights: Tensor | None,
        grad_lse: Tensor | None,
        grad_attn_mask: Tensor | None,
        grad_columns: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of query, key, value and, for each batch element, of the biases.

        The gradients of masks are added to ``grad_attn_mask``, (N|1, H|1, L, S), and ``grad_columns``, (N, H, S).
        """
        query, key, value = arguments.query, arguments.key, arguments.value
        grads = [x.new_empty(x.shape) for x in (query, key, value)]
        grad_biases: list[Tensor | None] = [
            None if bias is None else bias.new_empty((query.shape[0], *bias.shape), dtype=arguments.accumulator_dtype)
            for bias in (arguments.bias_k, arguments.bias_v)
        ]
        results = (output, grad_output, grad_weights, grad_lse, *grads, grad_attn_mask, grad_columns, *grad_biases)
        self._call("backward", _BACKWARD, arguments, stats, results)
        return grads[0], grads[1], grads[2], grad_biases[0], grad_biases[1]

    def product(
        self, left: Tensor, right: Tensor, bias: Tensor | None, left_is_transposed: bool, right_is_transposed: bool
    ) -> Tensor:
        """The matrix product (M, N) of (M, K) and (K, N), each of which may lie transposed, plus a bias (N)."""
        M, N = left.shape[1 if left_is_transposed else 0], right.shape[0 if right_is_transposed else 1]
        output = left.new_empty((M, N))
        fields: list[float] = [field for x in (left, right, bias, output, None) for field in _fields(x)]
        fields += (left_is_transposed, right_is_transposed, torch.get_num_threads())
        self._run("product", _PRODUCT.pack(*fields), _PRODUCT_WORKSPACE_OFFSET, output)
        return output

    def dropout_mask(self, seed: Tensor, shape: Sequence[int], dropout_p: float) -> Tensor:
        """The (N, H, L, S') bool mask, True = keep, that forward and backward draw from a seed."""
        mask = seed.new_empty(tuple(shape), dtype=torch.bool)
        seed_fields, mask_fields = (struct.pack(f"={_TENSOR}", *_fields(x)) for x in (seed, mask))
        threads = ctypes.c_int64(torch.get_num_threads())
        self._check(self._functions["dropout_mask"](seed_fields, mask_fields, ctypes.c_double(dropout_p), threads))
        return mask

    def exp2(self, x: Tensor) -> Tensor:
        """The kernels' exp2 of a contiguous fp32 or fp64 tensor, for its test."""
        result = torch.empty_like(x)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, result))
        self._check(self._functions["exp2"](*pointers, ctypes.c_int64(x.numel()), ctypes.c_int64(DTYPES[x.dtype])))
        return result

    def _call(
        self,
        function: str,
        layout: struct.Struct,
        arguments: Arguments,
        stats: Tensor | None,
        results: Iterable[Tensor | None],
    ) -> None:
        fields: list[float] = [field for x in (*arguments[:8], stats, None) for field in _fields(x)]
        fields += (
            -FAR if arguments.first_visible is None else arguments.first_visible,
            FAR if arguments.last_visible is None else arguments.last_visible,
            arguments.add_zero_attn,
            arguments.average_attn_weights,
            torch.get_num_threads(),
            arguments.dropout_p,
            arguments.scale,
        )
        for x in results:
            fields += _fields(x)
        self._run(function, layout.pack(*fields), _WORKSPACE_OFFSET, arguments.query)

    def _run(self, function: str, fields: bytes, workspace_offset: int, like: Tensor) -> None:
        """Calls a function with a packed struct, to which it adds the workspace that it needs."""
        call = bytearray(fields)
        pointer = (ctypes.c_char * len(call)).from_buffer(call)
        needed = self._functions[f"{function}_workspace"](pointer)
        self._check(min(needed, 0))
        workspace = like.new_empty((needed,), dtype=torch.uint8)
        _WORKSPACE.pack_into(call, workspace_offset, *_fields(workspace))
        self._check(self._functions[function](pointer))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self._c.fused_mha_last_error().decode())


def _fields(x: Tensor | None) -> tuple[Any, ...]:
    """`fused_mha_tensor` of a tensor of at most four dimensions."""
    if x is None:
        return _ABSENT
    missing = 4 - x.dim()
    if missing < 0:
        raise RuntimeError(f"tensors of more than four dimensions are not supported; got shape {tuple(x.shape)}")
    bytes_left = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    dtype = DTYPES.get(x.dtype, _UNKNOWN)
    if not missing:
        return (x.data_ptr(), dtype, bytes_left, *x.shape, *x.stride())
    return (x.data_ptr(), dtype, bytes_left, *x.shape, *(1,) * missing, *x.stride(), *(0,) * missing)


def _torch_parallel_for() -> int | None:
    """The address of torch's parallel loop, which follows `torch.set_num_threads`."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            function = ctypes.CDLL(str(folder / name)).torch_parallel_for
            return ctypes.cast(function, ctypes.c_void_p).value
    raise RuntimeError(f"no torch library in {folder}")


def load(folders: Iterable[str]) -> Library | None:
    """The library in the first of a package's folders that has it, or None: it was installed without a C++ compiler.

    An editable installation has its compiled files in another folder than the sources.
    """
    paths = (Path(folder) / name for folder in folders for name in NAMES)
    path = next((path for path in paths if path.exists()), None)
    return None if path is None else Library(path)

"""The CPU library: finds it, checks it, and calls its C functions on tensors. `backends.cpu` calls this.

The library is a plain C-ABI one (`csrc/c_api.h`), built without torch. Its threads are torch's: it is given the address
of `torch_parallel_for` in torch's own library.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_mha.ops.schema import Arguments, Settings, count_columns, weights_shape

ABI_VERSION = 3
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
_ONES, _ZEROS = ([(value,) * count for count in range(5)] for value in (1, 0))
_ONE_DIMENSION = (1, 1, 1, 1, 0, 0, 0)  # the other sizes and the strides of a contiguous tensor of one dimension
_SHARED_TENSORS = 10
_WORKSPACE = struct.Struct(f"={_TENSOR}")
_WORKSPACE_OFFSET = _WORKSPACE.size * (_SHARED_TENSORS - 1)
_FORWARD = struct.Struct(f"={_TENSOR * _SHARED_TENSORS}5q2d{_TENSOR * 3}")
_BACKWARD = struct.Struct(f"={_TENSOR * _SHARED_TENSORS}5q2d{_TENSOR * 11}")
_PRODUCT = struct.Struct(f"={_TENSOR * 5}3q")
_PRODUCT_WORKSPACE_OFFSET = _WORKSPACE.size * 4
_MODULE_TENSORS = 12
_MODULE = struct.Struct(f"={_TENSOR * (_MODULE_TENSORS + _SHARED_TENSORS)}5q2d{_TENSOR * 3}q")
_MODULE_WORKSPACE_OFFSET = _WORKSPACE_OFFSET + _WORKSPACE.size * _MODULE_TENSORS


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
        self._computations = {
            name: (self._function(f"{name}_workspace"), self._function(name))
            for name in ("forward", "backward", "product", "module")
        }
        self._functions = {name: self._function(name) for name in ("dropout_mask", "set_isa", "exp2")}
        self._c.fused_mha_set_parallel_for(ctypes.c_void_p(_torch_parallel_for()))
        self.cpu_vendor: str = self._c.fused_mha_cpu_vendor().decode()  # as CPUID gives it, such as AuthenticAMD
        self.isa: str = self._c.fused_mha_isa().decode()  # the instruction set in use
        if wanted := os.environ.get(ISA_VARIABLE):
            self.set_isa(wanted)

    def _function(self, name: str) -> Any:
        function = getattr(self._c, f"fused_mha_{name}")
        function.restype = ctypes.c_int64
        return function

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
        grads: Sequence[Tensor],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients for each batch element of the biases; those of query, key and value are written to ``grads``.

        The gradients of masks are added to ``grad_attn_mask``, (N|1, H|1, L, S), and ``grad_columns``, (N, H, S).
        """
        query = arguments.query
        grad_biases: list[Tensor | None] = [
            None if bias is None else bias.new_empty((query.shape[0], *bias.shape), dtype=arguments.accumulator_dtype)
            for bias in (arguments.bias_k, arguments.bias_v)
        ]
        results = (output, grad_output, grad_weights, grad_lse, *grads, grad_attn_mask, grad_columns, *grad_biases)
        self._call("backward", _BACKWARD, arguments, stats, results)
        return grad_biases[0], grad_biases[1]

    def product(
        self,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        left_is_transposed: bool,
        right_is_transposed: bool,
        output: Tensor | None = None,
    ) -> Tensor:
        """The matrix product (M, N) of (M, K) and (K, N), each of which may lie transposed, plus a bias (N).

        The rows of a matrix may be those of a batch of sequences, (batch, length, columns).
        """
        if output is None:
            M, N = left.shape[1 if left_is_transposed else 0], right.shape[0 if right_is_transposed else 1]
            output = left.new_empty((M, N))
        fields = (*_matrix_fields(left), *_matrix_fields(right), *_fields(bias), *_matrix_fields(output), *_ABSENT)
        numbers = (left_is_transposed, right_is_transposed, torch.get_num_threads())
        self._run("product", _PRODUCT.pack(*fields, *numbers), _PRODUCT_WORKSPACE_OFFSET)
        return output

    def module(
        self,
        inputs: Sequence[Tensor],
        in_weights: Sequence[Tensor],
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        num_heads: int,
        settings: Settings,
        output: Tensor,
        kept: Sequence[Tensor] = (),
    ) -> Tensor | None:
        """Project, attend and project back.

        Args:
            inputs: query (N, L, E), and key and value unless they are what stands before them.
            in_weights: packed, (3E, E), or three of them.
            in_bias: packed, (3E), or None.
            out_weight: (E, E).
            out_bias: (E), or None.
            num_heads: H.
            settings: masks and what else attention takes.
            output: (N, L, E), is written.
            kept: where query, key, value (N, length, H, D), heads (N, L, H, D) and stats go, if a backward needs them.

        Returns:
            The attention weights, or None.
        """
        query = inputs[0]
        weights = None
        if settings.need_weights:
            (N, L, _), columns = query.shape, count_columns(settings, inputs[-1].shape[1])
            weights = query.new_empty(weights_shape(settings, N, L, num_heads, columns))
        *projections, heads, stats = map(_fields, kept) if kept else (_ABSENT,) * 5
        fields = (
            *_fields(query),
            *_fields(in_weights[0]),
            *_fields(in_bias),
            *_fields(out_weight),
            *_fields(out_bias),
            *_fields(output),
            *(_ABSENT if len(inputs) < 2 else _fields(inputs[1])),
            *(_ABSENT if len(inputs) < 3 else _fields(inputs[2])),
            *(_ABSENT * 2 if len(in_weights) == 1 else (*_fields(in_weights[1]), *_fields(in_weights[2]))),
            *_ABSENT * 2,
            *itertools.chain(*projections, *(_ABSENT if x is None else _fields(x) for x in settings[:5])),
            *stats,
            *_ABSENT,
            *_numbers(settings),
            *heads,
            *_fields(weights),
            *_ABSENT,
            num_heads,
        )
        self._run("module", _MODULE.pack(*fields), _MODULE_WORKSPACE_OFFSET)
        return weights

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
        fields += _numbers(arguments)
        for x in results:
            fields += _fields(x)
        self._run(function, layout.pack(*fields), _WORKSPACE_OFFSET)

    def _run(self, computation: str, fields: bytes, workspace_offset: int) -> None:
        """Runs a computation on a packed struct, to which it adds the workspace that this needs."""
        call = bytearray(fields)
        pointer = (ctypes.c_char * len(call)).from_buffer(call)
        measure, run = self._computations[computation]
        needed = measure(pointer)
        self._check(min(needed, 0))
        workspace = torch.empty(needed, dtype=torch.uint8, device="cpu")
        _WORKSPACE.pack_into(
            call, workspace_offset, workspace.data_ptr(), DTYPES[torch.uint8], needed, needed, *_ONE_DIMENSION
        )
        self._check(run(pointer))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self._c.fused_mha_last_error().decode())


def _fields(x: Tensor | None) -> tuple[Any, ...]:
    """`fused_mha_tensor` of a tensor of at most four dimensions."""
    if x is None:
        return _ABSENT
    shape = x.shape
    missing = 4 - len(shape)
    if missing < 0:
        raise RuntimeError(f"tensors of more than four dimensions are not supported; got shape {tuple(shape)}")
    bytes_left = x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize
    dtype = DTYPES.get(x.dtype, _UNKNOWN)
    return (x.data_ptr(), dtype, bytes_left, *shape, *_ONES[missing], *x.stride(), *_ZEROS[missing])


def _matrix_fields(x: Tensor) -> tuple[Any, ...]:
    """`fused_mha_tensor` of a matrix, or of a batch of sequences whose rows are those of one."""
    fields = _fields(x)
    if x.dim() == 2:
        return (*fields[:3], 1, *fields[3:6], 0, *fields[7:10])
    return fields


def _numbers(settings: Arguments | Settings) -> tuple[Any, ...]:
    """What `fused_mha_attention` has behind its tensors."""
    return (
        -FAR if settings.first_visible is None else settings.first_visible,
        FAR if settings.last_visible is None else settings.last_visible,
        settings.add_zero_attn,
        settings.average_attn_weights,
        torch.get_num_threads(),
        settings.dropout_p,
        settings.scale,
    )


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

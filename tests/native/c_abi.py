"""The structs of `csrc/c_api.h` in ctypes, filled from tensors: the C functions without the package's Python."""

from __future__ import annotations

import ctypes

import torch

from attention_oracle import make_arguments
from fused_mha.backends.cpu import LIBRARY

ISAS = [] if LIBRARY is None else LIBRARY.available_isas
C = None if LIBRARY is None else ctypes.CDLL(str(LIBRARY.path))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.uint8)
if C is not None:
    C.fused_mha_last_error.restype = ctypes.c_char_p
    for _name in ("forward", "backward", "product", "module"):
        getattr(C, f"fused_mha_{_name}").restype = getattr(C, f"fused_mha_{_name}_workspace").restype = ctypes.c_int64
    for _name in ("dropout_mask", "exp2", "column_sums"):
        getattr(C, f"fused_mha_{_name}").restype = ctypes.c_int64
    C.fused_mha_isa.restype = C.fused_mha_isa_of.restype = ctypes.c_char_p


def _isas_of(dtype: torch.dtype) -> list[str]:
    found = []
    for name in ISAS:
        C.fused_mha_set_isa(name.encode())
        if C.fused_mha_isa_of(ctypes.c_int64(DTYPES.index(dtype))) == name.encode():
            found.append(name)
    if found:
        C.fused_mha_set_isa(LIBRARY.isa.encode())
    return found


# The instruction sets that have code of their own for a dtype.
ISAS_OF = {dtype: _isas_of(dtype) for dtype in DTYPES if dtype.is_floating_point}


class TensorFields(ctypes.Structure):
    """`fused_mha_tensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
    )

    def fill(self, x: torch.Tensor) -> None:
        """Describe a tensor of at most four dimensions."""
        self.data, self.dtype = x.data_ptr(), DTYPES.index(x.dtype)
        self.bytes = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
        for d in range(4):
            self.size[d] = x.shape[d] if d < x.dim() else 1
            self.stride[d] = x.stride(d) if d < x.dim() else 0


SHARED = ("query", "key", "value", "attn_mask", "key_padding_mask", "bias_k", "bias_v", "seed")
SHARED += ("sinks", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "weights_of_heads", "stats", "workspace")


class Attention(ctypes.Structure):
    """`fused_mha_attention`."""

    _fields_ = (
        *((name, TensorFields) for name in SHARED),
        *((name, ctypes.c_int64) for name in ("first_visible", "last_visible", "bottom_right")),
        *((name, ctypes.c_int64) for name in ("add_zero_attn", "average_weights")),
        ("threads", ctypes.c_int64),
        ("dropout_p", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


RESULTS = {
    "forward": ("output", "weights", "lse"),
    "backward": (
        *("output", "grad_output", "grad_weights", "grad_lse", "grad_query", "grad_key", "grad_value"),
        *("grad_attn_mask", "grad_columns", "grad_bias_k", "grad_bias_v", "grad_sinks", "grad_distances"),
    ),
}


class Forward(ctypes.Structure):
    """`fused_mha_forward_arguments`."""

    _fields_ = (("attention", Attention), *((name, TensorFields) for name in RESULTS["forward"]))


class Backward(ctypes.Structure):
    """`fused_mha_backward_arguments`."""

    _fields_ = (("attention", Attention), *((name, TensorFields) for name in RESULTS["backward"]))


MODULE = ("query", "query_weight", "query_bias", "out_weight", "out_bias", "output")
MODULE += ("key", "value", "key_weight", "value_weight", "key_bias", "value_bias")


class Module(ctypes.Structure):
    """`fused_mha_module_arguments`."""

    _fields_ = (*((name, TensorFields) for name in MODULE), ("core", Forward), ("num_heads", ctypes.c_int64))


class Product(ctypes.Structure):
    """`fused_mha_product_arguments`."""

    _fields_ = (
        *((name, TensorFields) for name in ("left", "right", "bias", "output", "workspace")),
        *((name, ctypes.c_int64) for name in ("left_is_transposed", "right_is_transposed", "threads")),
    )


class Call:
    """A call of a C function with every tensor that it can have; `fields` of one may be changed before `run`."""

    def __init__(self, function: str, dtype: torch.dtype = torch.float32) -> None:
        N, L, S, H, H_kv, D, D_v = 2, 3, 5, 4, 2, 3, 6
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        a = make_arguments(
            N=N, L=L, S=S, H=H, H_kv=H_kv, D=D, D_v=D_v, dtype=dtype, mask_dtype=dtype, mask_shape="NHLS", bias_kv=True
        )
        self.tensors = {
            **{name: a[name] for name in ("query", "key", "value", "attn_mask", "bias_k", "bias_v")},
            "key_padding_mask": torch.zeros(N, S, dtype=dtype),
            "seed": torch.tensor([1, 2]),
            "sinks": torch.zeros(H, dtype=dtype),
            "alibi_slopes": torch.zeros(H, dtype=dtype),
            "weights_of_heads": torch.tensor([3, 1, 0]),
            "stats": torch.ones(2, N, H, L, dtype=accumulator),
            "output": torch.zeros(N, L, H, D_v, dtype=dtype),
        }
        if function == "forward":
            self.tensors["weights"] = torch.zeros(N, 3, L, S + 2, dtype=dtype)
            self.tensors["lse"] = torch.zeros(N, H, L, dtype=accumulator)
        else:
            self.tensors |= {
                "grad_output": torch.zeros(N, L, H, D_v, dtype=dtype),
                "grad_weights": torch.zeros(N, 3, L, S + 2, dtype=dtype),
                "grad_lse": torch.zeros(N, H, L, dtype=accumulator),
                "grad_query": torch.zeros(N, L, H, D, dtype=dtype),
                "grad_key": torch.zeros(N, S, H_kv, D, dtype=dtype),
                "grad_value": torch.zeros(N, S, H_kv, D_v, dtype=dtype),
                "grad_attn_mask": torch.zeros(N, H, L, S, dtype=accumulator),
                "grad_columns": torch.zeros(N, H, S, dtype=accumulator),
                "grad_bias_k": torch.zeros(N, H_kv, D, dtype=accumulator),
                "grad_bias_v": torch.zeros(N, H_kv, D_v, dtype=accumulator),
                "grad_sinks": torch.zeros(N, H, dtype=accumulator),
                "grad_distances": torch.zeros(N, H, S, dtype=accumulator),
            }
        self.function = function
        self.arguments = Forward() if function == "forward" else Backward()
        attention = self.arguments.attention
        attention.first_visible, attention.last_visible = -(2**60), 2**60
        attention.add_zero_attn, attention.average_weights, attention.threads = 1, 0, 1
        attention.dropout_p, attention.scale = 0.5, 1.0
        for name, x in self.tensors.items():
            self.fields(name).fill(x)
        self.tensors["workspace"] = torch.empty(self.workspace(), dtype=torch.uint8)
        self.fields("workspace").fill(self.tensors["workspace"])

    def fields(self, name: str) -> TensorFields:
        """Of one tensor."""
        return getattr(self.arguments.attention if name in SHARED else self.arguments, name)

    def workspace(self) -> int:
        """The bytes that the library asks for; negative on an error."""
        return getattr(C, f"fused_mha_{self.function}_workspace")(ctypes.byref(self.arguments))

    def error(self) -> str | None:
        """Run, and give the message of an error."""
        if getattr(C, f"fused_mha_{self.function}")(ctypes.byref(self.arguments)) == 0:
            return None
        return C.fused_mha_last_error().decode()


def assert_refused(call, *names: str) -> None:
    """An error that begins with one of the names, if any is given; nothing is written."""
    before = {name: x.clone() for name, x in call.tensors.items()}
    error = call.error()
    assert error is not None
    assert not names or error.startswith(tuple(f"{name} " for name in names)), error
    for name, x in before.items():
        assert torch.equal(x.view(torch.uint8), call.tensors[name].view(torch.uint8)), name

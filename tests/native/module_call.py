"""A call of `fused_mha_module` and of `fused_mha_product` by their C structs, without the package's Python."""

from __future__ import annotations

import ctypes

import torch

from native.c_abi import MODULE, C, Module, Product, TensorFields

SIZES = {"N": 2, "L": 3, "S": 5, "E": 7, "kdim": 4, "vdim": 9, "H": 4, "H_kv": 2, "D": 3, "D_v": 6, "E_out": 8}
KEPT = ("projected query", "projected key", "projected value", "heads")  # as the library's errors name them
SHARED = ("attn_mask", "key_padding_mask", "bias_k", "bias_v", "seed", "stats", "workspace")


class ModuleCall:
    """A call with every tensor that it can have, or without what the backward needs; `fields` may be changed."""

    def __init__(self, *, keeps: bool = True, dtype: torch.dtype = torch.float32, **sizes: int) -> None:
        self.sizes = SIZES | sizes
        N, L, S, E, kdim, vdim, H, H_kv, D, D_v, E_out = self.sizes.values()
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.full(shape, float("nan"), dtype=dtype)

        self.tensors = {
            "query": draw(N, L, E),
            "key": draw(N, S, kdim),
            "value": draw(N, S, vdim),
            "query_weight": draw(H * D, E),
            "query_bias": draw(H * D),
            "key_weight": draw(H_kv * D, kdim),
            "key_bias": draw(H_kv * D),
            "value_weight": draw(H_kv * D_v, vdim),
            "value_bias": draw(H_kv * D_v),
            "out_weight": draw(E_out, H * D_v),
            "out_bias": draw(E_out),
            "output": empty(N, L, E_out),
            "attn_mask": draw(N, H, L, S),
            "key_padding_mask": draw(N, S),
            "bias_k": draw(H_kv, D),
            "bias_v": draw(H_kv, D_v),
            "seed": torch.tensor([1, 2]),
            "weights": empty(N, H, L, S + 2),
            "lse": empty(N, H, L, dtype=accumulator),
        }
        if keeps:
            shapes = ((N, L, H, D), (N, S, H_kv, D), (N, S, H_kv, D_v), (N, L, H, D_v))
            self.tensors |= {name: empty(*shape) for name, shape in zip(KEPT, shapes, strict=True)}
            self.tensors["stats"] = empty(2, N, H, L, dtype=accumulator)
        self.arguments = Module()
        attention = self.arguments.core.attention
        attention.first_visible, attention.last_visible = -(2**60), 2**60
        attention.add_zero_attn, attention.threads = 1, 1
        attention.dropout_p, attention.scale = 0.5, 1.0
        self.arguments.num_heads = H
        for name, x in self.tensors.items():
            self.fields(name).fill(x)
        self.allocate_workspace()

    def allocate_workspace(self) -> None:
        """Of the size that the library asks for."""
        size = self.workspace()
        assert size >= 0, C.fused_mha_last_error().decode()
        self.tensors["workspace"] = torch.empty(size, dtype=torch.uint8)
        self.fields("workspace").fill(self.tensors["workspace"])

    def fields(self, name: str) -> TensorFields:
        """Of one tensor."""
        if name in KEPT[:3]:
            return getattr(self.arguments.core.attention, name.removeprefix("projected "))
        if name in SHARED:
            return getattr(self.arguments.core.attention, name)
        if name == "heads":
            return self.arguments.core.output
        return getattr(self.arguments if name in MODULE else self.arguments.core, name)

    def workspace(self) -> int:
        """The bytes that the library asks for; negative on an error."""
        return C.fused_mha_module_workspace(ctypes.byref(self.arguments))

    def error(self) -> str | None:
        """Run, and give the message of an error."""
        return None if C.fused_mha_module(ctypes.byref(self.arguments)) == 0 else C.fused_mha_last_error().decode()


class ProductCall:
    """output (2, 3, 4) = left (2, 3, 5) right (5, 4) + bias, or what another shape gives."""

    def __init__(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        output: torch.Tensor,
        transposed: tuple,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.arguments = Product()
        self.tensors = {"left": left, "right": right, "output": output}
        self.tensors["bias"] = output.new_zeros(output.shape[-1]) if bias is None else bias
        self.arguments.left_is_transposed, self.arguments.right_is_transposed = transposed
        self.arguments.threads = 1
        for name, x in self.tensors.items():
            self.fields(name).fill(x if x.dim() == 3 or name == "bias" else x.unsqueeze(0))
        size = C.fused_mha_product_workspace(ctypes.byref(self.arguments))
        self.tensors["workspace"] = torch.empty(max(size, 0), dtype=torch.uint8)
        self.fields("workspace").fill(self.tensors["workspace"])

    def fields(self, name: str) -> TensorFields:
        """Of one tensor."""
        return getattr(self.arguments, name)

    def error(self) -> str | None:
        """Run, and give the message of an error."""
        return None if C.fused_mha_product(ctypes.byref(self.arguments)) == 0 else C.fused_mha_last_error().decode()

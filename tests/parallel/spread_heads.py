"""Modules whose heads are spread over ranks, with the one device's beside them: what the tests of `tensor` share."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import fused_mha
from fused_mha.parallel import HeadwiseParallel

E, H, N, L = 16, 4, 4, 32
OPTIONS = {
    "as torch's": {},
    "no bias": {"bias": False},
    "own sizes": {"kdim": 12, "vdim": 10},
    "grouped heads, rope": {"num_kv_heads": 2, "rope": fused_mha.RotaryEmbedding(4)},
    "every other option": {
        "num_kv_heads": 2,
        "value_head_dim": 3,
        "qk_norm": "layer",
        "sinks": True,
        "gate": True,
        "alibi": True,
        "softcap": 5.0,
        "window": (3, None),
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
    "dropout": {"dropout": 0.25},
}
MASKS = {
    "no mask": {},
    "padding": {"key_padding_mask": torch.arange(L) >= torch.tensor([[L], [20], [7], [L]])},
    "mask of heads": {"attn_mask": torch.arange(N * H * L * L).view(N * H, L, L) % 7 == 0},
    "float mask of each head": {"attn_mask": torch.linspace(-1, 1, H * L * L).view(1, H, L, L)},
}


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.attention = fused_mha.MultiHeadAttention(E, H, batch_first=True, **OPTIONS[options])

    def forward(self, x, **call):
        size = self.attention.kdim, self.attention.vdim
        key, value = (x if n == E else x[..., :n] for n in size)
        return self.attention(x, key, value, **{"is_causal": True, **call})


def block(options, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block(options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases are 0 and scales 1 at first
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-1, 1, parameter.numel()) + len(name) / 50)
    return model.to(dtype)


def batch(dtype=torch.float32):
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(1)).to(dtype)


def spread(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    return parallelize_module(model, mesh, {"attention": HeadwiseParallel()})


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(state_dict, whole):
    """Whether it has the names, in their order, and the values of one device."""
    return list(state_dict) == list(whole) and all(torch.equal(full(state_dict[name]), x) for name, x in whole.items())

"""Calls of a module that are served in one on CUDA; for the interpreted kernels and for those on a GPU."""

import itertools

import torch

import fused_mha
from fused_mha.testing import assert_parity

E, H, N, L, S = 32, 2, 2, 5, 7
SHARING = ("self", "keys and values", "separate", "other sizes", "unbatched")
ROLES = ("query", "key", "value")


def modules(device="cpu", dtype=torch.float32, **options):
    """Ours and torch's, of the same parameters."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, device=device, dtype=dtype, **options)
    ours = fused_mha.MultiHeadAttention(E, H, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():  # torch's are 0
        for module in (ours, theirs):
            for bias in (module.in_proj_bias, module.out_proj.bias):
                if bias is not None:
                    bias.copy_(torch.linspace(-1, 1, bias.numel()))
    return ours, theirs


def inputs(sharing, batch_first, device="cpu", dtype=torch.float32):
    """Query, key and value; what is one in the call is one here."""
    generator = torch.Generator().manual_seed(1)

    def draw(length, size):
        shape = (length, size) if sharing == "unbatched" else (N, length, size)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x if batch_first or sharing == "unbatched" else x.transpose(0, 1).contiguous()

    if sharing == "self":
        return (draw(S, E),) * 3
    if sharing == "separate":
        return draw(L, E), draw(S, E), draw(S, E)
    if sharing == "other sizes":
        return draw(L, E), draw(S, 12), draw(S, 20)
    return draw(L, E), *(draw(S, E),) * 2


def masks(kind, queries, sharing, device="cpu", dtype=torch.float32):
    """The arguments of a call, by the kind of its masks; each sequence has another padding."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.arange(S) >= torch.tensor([[5], [2]])
    hidden = hidden[0] if sharing == "unbatched" else hidden
    batch = 1 if sharing == "unbatched" else N
    of_heads = torch.rand(batch * H, queries, S, generator=generator) < 0.3
    of_heads[..., 0] = False  # of rows that see nothing, torch makes NaN
    given = {
        "padding": {"key_padding_mask": hidden},
        "float padding": {"key_padding_mask": torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).to(dtype)},
        "mask": {"attn_mask": torch.randn(queries, S, generator=generator).to(dtype)},
        "mask of heads, padding": {
            "attn_mask": of_heads,
            "key_padding_mask": hidden,
        },
        "weights": {},
    }[kind]
    return {name: x.to(device) for name, x in given.items()}


KINDS = ("weights", "padding", "float padding", "mask", "mask of heads, padding")
CASES = [
    {"sharing": sharing, "kind": kind, "batch_first": batch_first, "options": options}
    for i, (sharing, kind, batch_first) in enumerate(itertools.product(SHARING, KINDS, (True, False)))
    for options in [({}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True})[i % 3]]
]
IDS = [f"{c['sharing']}, {c['kind']}, {'N, L' if c['batch_first'] else 'L, N'}, {[*c['options']]}" for c in CASES]


def matches_torch(case, device="cpu", dtype=torch.float32):
    """Whether a call gives torch's outputs and gradients, with weights of each head, their mean or none, by turns."""
    sharing, batch_first, options = case["sharing"], case["batch_first"], case["options"]
    sizes = {"kdim": 12, "vdim": 20} if sharing == "other sizes" else {}
    ours, theirs = modules(device, dtype, batch_first=batch_first, **options, **sizes)
    given = inputs(sharing, batch_first, device, dtype)
    arguments = masks(case["kind"], S if sharing == "self" else L, sharing, device, dtype)
    flags = ({}, {"average_attn_weights": False}, {"need_weights": False})[CASES.index(case) % 3]
    for _ in range(2):  # of which the second is looked up
        assert_parity(ours, theirs, *given, **arguments, **flags)

"""Calls of `varlen_attention` for its tests, and what they have to equal: `attention` on each sequence alone."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

import fused_mha

LENGTHS = ((5, 0, 17, 1, 70, 33, 0), (7, 3, 0, 1, 90, 20, 0))  # queries and keys of each sequence
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window, bottom right": {"window": (3, 2), "causal_alignment": "bottom_right"},
    "sinks": {"of_heads": ("sinks",)},
    "ALiBi, bottom right": {"of_heads": ("alibi_slopes",), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 2.0},
    "padding": {"padding_dtype": torch.bool},
    "float padding": {"padding_dtype": torch.float32},
    "scale": {"scale": -0.3},
}


def cu_seqlens(lengths, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def packed_call(lengths=LENGTHS, H=4, H_kv=2, D=16, D_v=24, dtype=torch.float32, rest=0, of_heads=(), **options):
    """The arguments of `varlen_attention`; ``rest`` rows are of no sequence."""
    tokens_q, tokens_k = (sum(of) + rest for of in lengths)
    padding_dtype = options.pop("padding_dtype", None)
    arguments = {
        "query": torch.randn(tokens_q, H, D, dtype=dtype),
        "key": torch.randn(tokens_k, H_kv, D, dtype=dtype),
        "value": torch.randn(tokens_k, H_kv, D_v, dtype=dtype),
        "cu_seqlens_q": cu_seqlens(lengths[0]),
        "cu_seqlens_k": cu_seqlens(lengths[1], torch.int32),
        **{name: torch.rand(H, dtype=torch.promote_types(dtype, torch.float32)) for name in of_heads},
        **options,
    }
    if padding_dtype is not None:
        hidden = torch.rand(tokens_k) < 0.3
        arguments["key_padding_mask"] = (
            hidden if padding_dtype == torch.bool else torch.randn(tokens_k).masked_fill(hidden, float("-inf"))
        )
    return arguments


@st.composite
def random_calls(draw, most=7, dtypes=(torch.float32,)):
    """The arguments of up to so many sequences, with every option."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=most))
    H_kv = draw(st.sampled_from([1, 2]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return packed_call(
        ([q for q, _ in lengths], [k for _, k in lengths]),
        H=H_kv * draw(st.sampled_from([1, 3])),
        H_kv=H_kv,
        D=draw(st.sampled_from([1, 8, 17])),
        D_v=draw(st.sampled_from([1, 16])),
        dtype=draw(st.sampled_from(dtypes)),
        of_heads=draw(st.sampled_from([(), ("sinks",), ("alibi_slopes",), ("sinks", "alibi_slopes")])),
        is_causal=draw(st.booleans()),
        causal_alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=draw(st.sampled_from([None, (2, None), (None, 3), (5, 1)])),
        softcap=draw(st.sampled_from([None, 1.5])),
        padding_dtype=draw(st.sampled_from([None, torch.bool, torch.float32])),
    )


def one_by_one(
    query, key, value, cu_seqlens_q, cu_seqlens_k, key_padding_mask=None, attention=fused_mha.attention, **options
):
    """Output and log-sum-exp of `attention` on the rows of each sequence."""
    results = []
    of_queries, of_keys = (itertools.pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    for (q, q_end), (k, k_end) in zip(of_queries, of_keys, strict=True):
        padding = None if key_padding_mask is None else key_padding_mask[None, k:k_end]
        rows = (query[None, q:q_end], key[None, k:k_end], value[None, k:k_end])
        results.append(attention(*rows, key_padding_mask=padding, return_lse=True, **options))
    return torch.cat([x.output[0] for x in results]), torch.cat([x.lse[0] for x in results], dim=1)


def with_gradients(function, arguments):
    """Output, log-sum-exp and the gradients of every floating argument, by name."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    output, lse = function(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(3)
    of_output, of_lse = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (output, lse))
    of_lse = of_lse.masked_fill(lse.isinf(), 0.0)
    grads = torch.autograd.grad([output, lse], [*leaves.values()], [of_output, of_lse])
    named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"output": output.detach(), "lse": lse.detach(), **named}


def varlen(**arguments):
    """Output and log-sum-exp of `varlen_attention`."""
    result = fused_mha.varlen_attention(**arguments, return_lse=True)
    assert result.weights is None
    return result.output, result.lse

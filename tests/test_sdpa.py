"""torch's own op as a back end: what becomes of masks there."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fused_mha
from attention_oracle import BACKENDS, checked, explain_attention, make_arguments
from fused_mha import MultiHeadAttention
from fused_mha.backends import cpu, sdpa
from fused_mha.backends.capability import not_supported_reasons

MERGED = "the masks of the call are merged into one additive tensor, (N|1, H|1, L|1, S)"


@pytest.mark.parametrize(
    ("arguments", "notes"),
    [
        ({"mask_dtype": torch.bool}, [MERGED]),
        ({"padding_dtype": torch.float32}, [MERGED]),
        ({"window": (1, 1)}, [MERGED]),
        ({"is_causal": True, "bias_kv": True}, [MERGED]),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, [MERGED]),
        ({}, []),
        ({"is_causal": True}, []),
        ({"L": 4, "is_causal": True, "causal_alignment": "bottom_right"}, []),
    ],
    ids=str,
)
def test_masks_have_a_note_of_the_memory_here_and_none_on_cpu(arguments, notes):
    arguments = make_arguments(**arguments)
    explanation = explain_attention(**arguments)
    assert (explanation.chosen, explanation.notes) == ("cpu", [f"instruction set {cpu.LIBRARY.isa}"])
    with fused_mha.backend("sdpa"):
        explanation = explain_attention(**arguments)
    assert (explanation.chosen, explanation.notes) == ("sdpa", notes)


def test_rows_that_see_nothing_are_cleaned_where_a_device_does_not(monkeypatch):
    monkeypatch.setattr(sdpa, "_KNOW_EMPTY_ROWS", ())
    arguments = make_arguments(mask_dtype=torch.bool, H=2)
    arguments["attn_mask"][1] = True
    leaf = arguments["query"].requires_grad_()
    with fused_mha.backend("sdpa"):
        output = fused_mha.attention(**arguments).output
    assert not output[:, 1].any()
    with fused_mha.backend("reference"):
        torch.testing.assert_close(output, fused_mha.attention(**arguments).output)
    (grad,) = torch.autograd.grad(output.sum(), leaf)
    assert not grad[:, 1].any()
    assert grad.isfinite().all()


def test_masks_of_half_types_are_left_to_others_away_from_the_cpu():
    def reasons(dtype):
        given = make_arguments(mask_dtype=torch.bool, dtype=dtype).items()
        arguments = {name: x.to("meta") for name, x in given}
        return explain_attention(**arguments).chosen, not_supported_reasons(
            sdpa.BACKEND.capability, checked(**arguments)
        )

    reason = "its kernels for meta are not known to be right with a mask in torch.bfloat16"
    assert reasons(torch.bfloat16) == ("reference", [reason])
    assert reasons(torch.float32) == ("sdpa", [])


@pytest.mark.parametrize("masks", [{}, {"padding_dtype": torch.bool}], ids=["plain", "padding"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["address", "rows", "elements"],
)
def test_kernels_that_read_16_bytes_are_given_whole_ones(view, masks, monkeypatch):
    monkeypatch.setattr(sdpa, "_READ_16_BYTES", ("cpu",))
    heads, attend = [], sdpa.torch_sdpa
    monkeypatch.setattr(sdpa, "torch_sdpa", lambda *given, **rest: (heads.append(given), attend(*given, **rest))[1])
    arguments = make_arguments(L=3, S=5, D=16, D_v=16, **masks)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    with fused_mha.backend("sdpa"):
        expected = fused_mha.attention(**arguments).output
        found = fused_mha.attention(**arguments | {name: view(arguments[name]) for name in ("query", "key", "value")})
    assert torch.equal(found.output, expected)
    assert len(heads) == 2
    for x in heads[1]:
        assert x.data_ptr() % 16 == 0
        assert x.stride(-1) == 1
        assert not any(stride * x.element_size() % 16 for stride in x.stride()[:-1])
    gradients = (torch.autograd.grad(output.sum(), leaves) for output in (found.output, expected))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_causal_mask_beside_is_causal_is_not_merged(dtype):
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    if dtype != torch.bool:
        mask = torch.zeros(4, 4).masked_fill(mask, -torch.inf)
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    with fused_mha.backend("sdpa"):
        assert fused_mha.explain(module, x, **arguments).notes == []
        assert torch.equal(module(x, x, x, **arguments)[0], module(x, x, x, is_causal=True, need_weights=False)[0])
        mask[3, 0] = True if dtype == torch.bool else -2.0  # says more than causality
        assert fused_mha.explain(module, x, **arguments).notes == [MERGED]
        output, _ = module(x, x, x, **arguments)
    with fused_mha.backend("reference"):
        expected, _ = module(x, x, x, **arguments)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_make_fx_records_the_mask_although_it_is_causal_at_the_trace(backend):
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    causal = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)

    def call(x, mask):
        return module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    with torch.no_grad(), fused_mha.backend(backend):
        graph = make_fx(call)(x, causal)
        mask = causal.clone()
        mask[3, 0] = -2.0
        torch.testing.assert_close(graph(x, mask), call(x, mask))


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_a_mask_row_that_broadcasts_over_queries_is_not_taken_for_a_causal_one(backend):
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    mask = torch.tensor([False, True, False, False]).view(1, 1, 1, 4)  # hides key 1 from every query
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    with fused_mha.backend("reference"):
        expected, _ = module(x, x, x, **arguments)
    with fused_mha.backend(backend):
        torch.testing.assert_close(module(x, x, x, **arguments)[0], expected)

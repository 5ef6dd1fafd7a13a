"""Small calls of a module on the CPU, which are looked up where one like them came before."""

import contextlib

import pytest
import torch

import fused_mha
from calls import NAN, composed


def small_module(**options):
    torch.manual_seed(0)
    return fused_mha.MultiHeadAttention(16, 4, batch_first=True, **options), torch.randn(2, 3, 16)


def test_a_small_call_like_one_before_is_not_checked_again(one_calls, monkeypatch):
    module, x = small_module(dropout=0.5)
    masks = [None, torch.zeros(3, 3, dtype=torch.bool), torch.zeros(8, 3, 3)]

    def results():
        torch.manual_seed(1)  # of dropout
        found = [module(x, x, x, attn_mask=mask, need_weights=weights) for mask in masks for weights in (True, False)]
        return [y for pair in found for y in pair if y is not None]

    first = results()
    with monkeypatch.context() as patch:
        patch.setattr(fused_mha.MultiHeadAttention, "_checked", None)
        assert all(map(torch.equal, results(), first))
        leaves = [*module.parameters()]
        torch.manual_seed(1)
        gradients = torch.autograd.grad(module(x, x, x)[0].sum(), leaves)
    assert len(one_calls) == 4 * len(masks) + 1
    assert all(one_calls)
    with composed():
        torch.manual_seed(1)
        expected = torch.autograd.grad(module(x, x, x)[0].sum(), leaves)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.eval(),
        lambda module: module.out_proj.register_forward_hook(lambda *_: torch.zeros(2, 3, 16)),
        lambda module: module.double(),
        lambda module: module.in_proj_weight.data.zero_(),
        lambda module: setattr(module, "num_heads", 2),
        lambda module: setattr(module, "dropout", 0.9),
        lambda module: setattr(module, "out_proj", torch.nn.Linear(16, 16, bias=False)),
        lambda module: setattr(module, "add_zero_attn", True),
    ],
    ids=["mode", "hook", "dtype", "values", "heads", "dropout", "projection", "virtual key"],
)
def test_what_changes_between_small_calls_takes_effect(change, one_calls):
    module, x = small_module(dropout=0.5)
    for _ in range(2):
        module(x, x, x)
    assert one_calls == [True, True]
    change(module)
    x = x.to(module.in_proj_weight.dtype)
    results = []
    for way in (contextlib.nullcontext(), composed()):
        torch.manual_seed(1)
        with way:
            results.append(module(x, x, x))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_errors_are_those_of_a_first_call():
    module, x = small_module()
    module(x, x, x)
    with pytest.raises(AssertionError, match="embedding size"):
        module(x[..., :8], x, x)
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.double(), x, x)
    with pytest.raises(RuntimeError, match="attn_mask must have shape"):
        module(x, x, x, attn_mask=torch.zeros(3, 4))


def test_padding_is_read_and_a_forced_back_end_serves(one_calls):
    module, x = small_module()
    padding = torch.tensor([[False, False, True]] * 2)
    for _ in range(2):
        module(x, x, x, key_padding_mask=padding)
    spoilt = x.masked_fill(padding.unsqueeze(-1), NAN)
    assert module(spoilt, spoilt, spoilt, key_padding_mask=padding)[0].isfinite().all()
    assert one_calls == [True, True, False]
    module(x, x, x)
    with fused_mha.backend("reference"):
        module(x, x, x)
    assert one_calls[-1] is False

"""What may be changed between forward and backward, and training on tensors of `torch.inference_mode`, on each path."""

import contextlib

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention
from fused_mha.backends import cpu
from fused_mha.module import projections
from fused_mha.module.arguments import ModuleArguments

N, L, E, H = 3, 5, 16, 2


@pytest.fixture(params=["one call", "cpu", "reference", "sdpa"])
def path(request):
    """A context in which calls take one path, and whether it returns weights."""
    if request.param == "one call":
        request.getfixturevalue("one_calls")
        return contextlib.nullcontext
    if request.param == "cpu":
        if cpu.LIBRARY is None:
            pytest.skip("this installation has no C++ library")
        request.getfixturevalue("monkeypatch").setattr("fused_mha.module.linear.dtypes", tuple)
    return lambda: fused_mha.backend(request.param)


def future():
    return torch.ones(L, L, dtype=torch.bool).triu(1)


def last_key():
    return (torch.arange(L) == L - 1).repeat(N, 1)


MASKS = {
    "bool mask": lambda: {"attn_mask": future()},
    "float mask": lambda: {"attn_mask": torch.randn(L, L)},
    "float mask per head": lambda: {"attn_mask": torch.randn(N * H, L, L)},
    "bool padding": lambda: {"key_padding_mask": last_key()},
    "float padding": lambda: {"key_padding_mask": torch.randn(N, L)},
    "both": lambda: {"attn_mask": future(), "key_padding_mask": last_key()},
}
MODULES = [{"batch_first": True}, {}, {"batch_first": True, "kdim": 6, "add_bias_kv": True}]

each_mask = pytest.mark.parametrize("make_masks", MASKS.values(), ids=MASKS)
each_module = pytest.mark.parametrize("options", MODULES, ids=str)


def make(kind, options):
    torch.manual_seed(0)
    return kind(E, H, **options)


def inputs(module):
    torch.manual_seed(1)
    query = torch.randn(*((N, L) if module.batch_first else (L, N)), E)
    if module.kdim == E:
        return query, query, query
    return query, torch.randn(*query.shape[:2], module.kdim), torch.randn(query.shape)


def gradients(module, given, masks, change=lambda output: None):
    output, _ = module(*given, **masks, need_weights=False)
    change(output)
    output.square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


def assert_as_torch(path, options, make_masks, change=lambda masks, output: None, given=inputs):
    torch.manual_seed(2)
    masks = make_masks()
    theirs = make(nn.MultiheadAttention, options)
    expected = gradients(theirs, inputs(theirs), {name: mask.clone() for name, mask in masks.items()})
    ours = make(MultiHeadAttention, options)
    with path():
        found = gradients(ours, given(ours), masks, lambda output: change(masks, output))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@each_mask
@each_module
def test_a_mask_may_be_filled_anew_before_the_backward(path, options, make_masks):
    def fill(masks, output):
        for mask in masks.values():
            mask.fill_(0)

    assert_as_torch(path, options, make_masks, fill)


@pytest.mark.parametrize("size", [L, 20])
def test_a_changed_mask_that_is_larger_than_the_query_is_noticed(one_calls, size):
    module = MultiHeadAttention(E, H)
    x, mask = torch.randn(size, 1, E), torch.randn(size, size)
    output, _ = module(x, x, x, attn_mask=mask)
    mask.fill_(0)
    noticed = mask.numel() > x.numel()
    with pytest.raises(RuntimeError, match="modified by an inplace") if noticed else contextlib.nullcontext():
        output.sum().backward()
    assert noticed == (size == 20)
    assert one_calls == [True]


def test_a_padding_mask_larger_than_the_query_may_be_filled_anew(path):
    def gradients_of(change):
        module = make(MultiHeadAttention, {"batch_first": True})
        query, key, padding = torch.ones(N, 1, E), torch.ones(N, 50, E).cumsum(1), torch.zeros(N, 50)
        padding[:, 20:] = -1e4
        return gradients(module, (query, key, key), {"key_padding_mask": padding}, lambda _: change(padding))

    for x, y in zip(gradients_of(lambda padding: padding.zero_()), gradients_of(lambda padding: None), strict=True):
        assert torch.equal(x, y)


@each_module
def test_the_output_may_be_changed_before_the_backward(path, options):
    theirs, ours = (make(kind, options) for kind in (nn.MultiheadAttention, MultiHeadAttention))
    expected = gradients(theirs, inputs(theirs), {}, lambda output: output.relu_())
    with path():
        found = gradients(ours, inputs(ours), {}, lambda output: output.relu_())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_input_that_is_changed_before_the_backward_is_noticed(path, batch_first):
    module = MultiHeadAttention(E, H, batch_first=batch_first)
    x = torch.randn(N, L, E)
    with path():
        x += module(x, x, x, need_weights=False)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        x.sum().backward()


@each_mask
@each_module
def test_tensors_of_inference_mode_are_trained_on(path, options, make_masks):
    def of_inference():
        with torch.inference_mode():
            return {name: mask.clone() for name, mask in make_masks().items()}

    def given(module):
        with torch.inference_mode():
            return inputs(module)

    assert_as_torch(path, options, of_inference, given=given)


def test_a_mask_of_inference_mode_that_is_larger_than_the_query_is_trained_beside(path):
    x, mask = torch.randn(1, 20, E), torch.randn(H, 20, 20)
    with torch.inference_mode():
        of_inference = mask.clone()
    options = {"batch_first": True}
    expected = gradients(make(nn.MultiheadAttention, options), (x, x, x), {"attn_mask": mask})
    with path():
        found = gradients(make(MultiHeadAttention, options), (x, x, x), {"attn_mask": of_inference})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_copies_of_one_tensor_are_one():
    with torch.inference_mode():
        x, y = torch.randn(2, L, N, E)
    copied = projections.recordable(ModuleArguments(x, y, y, None, False, None, True, False))
    query, key, value = copied[:3]
    assert key is value
    assert torch.equal(query, x)
    assert not any(one.is_inference() for one in (query, key))
    assert projections.recordable(copied._replace(key=x)).query is query

"""What `explain` says of a module's projections: the rule of `linear` and the reasons of `one_call`."""

import pytest
import torch

import fused_mha
from fused_mha import linear
from fused_mha.backends import cpu

pytestmark = pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no C++ library")


def projections(module, **arguments):
    return fused_mha.explain(module, torch.randn(2, 5, 16), **arguments).projections


@pytest.fixture
def module():
    return fused_mha.MultiHeadAttention(16, 4, batch_first=True)


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """The rule as on a processor where our products are the faster ones."""
    monkeypatch.setattr(linear, "dtypes", lambda: (torch.float32, torch.bfloat16))


def test_one_call_where_it_serves(module):
    assert projections(module) == "in one call with the attention"
    with torch.autocast("cpu", torch.bfloat16):
        assert projections(module) == "in one call with the attention"


def test_our_product_apart_from_the_attention_where_a_projection_is_hooked(module):
    module.out_proj.register_forward_hook(lambda *_: None)
    assert projections(module) == (
        "by fused_mha's product, apart from the attention: a projection is hooked, replaced, reparametrized, sharded "
        "or incomplete"
    )


def test_torchs_linear_where_the_rule_prefers_it(module, monkeypatch):
    monkeypatch.setattr(linear, "dtypes", lambda: (torch.float16,))
    monkeypatch.setattr(linear, "serves", lambda dtype, rows, features: False)
    assert projections(module) == f"by torch's linear, apart from the attention: {linear.RULE}"


def test_torchs_linear_beside_another_back_end(module):
    with fused_mha.backend("reference"):
        assert projections(module) == "by torch's linear, apart from the attention: the back end is not cpu"


def test_a_mask_that_needs_a_gradient(module):
    mask = torch.zeros(5, 5, requires_grad=True)
    assert "a mask needs a gradient" in projections(module, attn_mask=mask)


def test_inputs_of_inference_mode_are_explained_in_training():
    with torch.inference_mode():
        x = torch.randn(2, 5, 8)
    assert fused_mha.explain(fused_mha.MultiHeadAttention(8, 2), x).chosen is not None

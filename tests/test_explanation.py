"""`explain`: what it says of a call and prints, what it takes, and what it refuses."""

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha.backends import cpu
from fused_mha.module import linear

NOTE_OF_CPU = f"instruction set {cpu.LIBRARY and cpu.LIBRARY.isa}"
NOTE_OF_REFERENCE = "the scores are built as an (N, H, L, S) tensor"
TRITON = "  triton: cannot: it runs on cuda alone (query is on cpu)\n"


def test_names_the_choice_and_the_reasons(module, x):
    reasons = {
        "cpu": [],
        "triton": ["it runs on cuda alone (query is on cpu)"],
        "sdpa": ["it returns no attention weights (need_weights=True)"],
        "reference": [],
    }
    explanation = fused_mha.explain(module, x)._replace(projections=None)
    assert explanation == fused_mha.Explanation("cpu", reasons, [NOTE_OF_CPU], override=None)
    with fused_mha.backend("reference"):
        explanation = fused_mha.explain(module, x)._replace(projections=None)
    assert explanation == fused_mha.Explanation("reference", reasons, [NOTE_OF_REFERENCE], override="reference")


def test_prints_choice_notes_and_reasons(module, x):
    assert str(fused_mha.explain(module, x)._replace(projections="by hand")) == (
        "back end: cpu (the first that can serve)\n"
        f"  note: {NOTE_OF_CPU}\n"
        "  projections: by hand\n"
        f"{TRITON}"
        "  sdpa: cannot: it returns no attention weights (need_weights=True)\n"
        "  reference: could serve"
    )
    assert str(fused_mha.explain(module, x, need_weights=False)).endswith(
        "  sdpa: could serve\n  reference: could serve"
    )
    with fused_mha.backend("reference"):
        assert str(fused_mha.explain(module, x, need_weights=False)).startswith(
            f"back end: reference (by fused_mha.backend('reference'))\n  note: {NOTE_OF_REFERENCE}\n"
        )


def test_prints_that_the_library_is_not_installed(module, x, without_the_library):
    projections = "  projections: by torch's linear, apart from the attention: the back end is not cpu\n"
    assert str(fused_mha.explain(module, x)) == (
        "back end: reference (the first that can serve)\n"
        f"  note: {NOTE_OF_REFERENCE}\n"
        f"{projections}"
        "  cpu: cannot: it is not in this installation\n"
        f"{TRITON}"
        "  sdpa: cannot: it returns no attention weights (need_weights=True)"
    )
    assert str(fused_mha.explain(module, x, need_weights=False)) == (
        "back end: sdpa (the first that can serve)\n"
        f"{projections}"
        "  cpu: cannot: it is not in this installation\n"
        f"{TRITON}"
        "  reference: could serve"
    )


def test_says_none_where_the_override_cannot_serve(module, x):
    with fused_mha.backend("sdpa"):
        explanation = fused_mha.explain(module, x)
    assert (explanation.chosen, explanation.notes, explanation.override) == (None, [], "sdpa")
    assert str(explanation).startswith("back end: none (by fused_mha.backend('sdpa'))\n")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"need_weights": False}, {"need_weights": False, "is_causal": True}])
def test_names_the_back_end_that_then_serves(training, arguments, x, served_by):
    module = fused_mha.MultiHeadAttention(16, 4, dropout=0.5, batch_first=True).train(training)
    chosen = fused_mha.explain(module, x, x, x, **arguments).chosen
    assert served_by == []  # it computes no attention
    module(x, x, x, **arguments)
    assert served_by == [chosen]


def test_takes_keys_values_and_forward_arguments(module, x):
    keys = torch.randn(2, 0, 16)
    explanation = fused_mha.explain(module, x, keys, keys, need_weights=False)
    assert explanation.reasons["sdpa"] == ["an input is empty (query (2, 5, 4, 4), key (2, 0, 4, 4))"]
    assert fused_mha.explain(module, x, keys, need_weights=False) == explanation


def test_draws_no_random_numbers(x):
    module = fused_mha.MultiHeadAttention(16, 4, dropout=0.5, batch_first=True)
    state = torch.get_rng_state()
    fused_mha.explain(module, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_explains_a_nested_tensor_as_the_module_serves_it(module, x):
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    module.eval()
    with torch.no_grad():
        module(nested, nested, nested, need_weights=False)
        assert fused_mha.explain(module, nested, need_weights=False).chosen == "cpu"


def test_refuses_wrong_input_as_the_module_does(module, x):
    with pytest.raises(AssertionError, match="embed_dim = 16"):
        fused_mha.explain(module, x[..., :8])


@pytest.mark.parametrize("other", [nn.MultiheadAttention(16, 4), nn.Linear(16, 16), None], ids=type)
def test_takes_our_module_alone(other, x):
    name = type(other).__name__
    expected = "module must be a fused_mha.MultiHeadAttention or scaled_dot_product_attention"
    with pytest.raises(TypeError, match=f"^{expected}; got {name}$"):
        fused_mha.explain(other, x)


def test_names_an_argument_that_forward_does_not_have(module, x):
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        fused_mha.explain(module, x, masks=None)


def test_explains_inputs_of_inference_mode_in_training():
    with torch.inference_mode():
        x = torch.randn(2, 5, 8)
    assert fused_mha.explain(fused_mha.MultiHeadAttention(8, 2), x).chosen is not None


def projections(module, **arguments):
    return fused_mha.explain(module, torch.randn(2, 5, 16), **arguments).projections


@pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no C++ library")
class TestProjections:
    """By the rule of `linear` and the reasons of `one_call`."""

    @pytest.fixture(autouse=True)
    def ours(self, monkeypatch):
        """The rule as on a processor where our products are the faster ones."""
        monkeypatch.setattr(linear, "dtypes", lambda: (torch.float32, torch.bfloat16))

    def test_one_call_where_it_serves(self, module):
        assert projections(module) == "in one call with the attention"
        with torch.autocast("cpu", torch.bfloat16):
            assert projections(module) == "in one call with the attention"

    def test_our_product_apart_from_the_attention_where_a_projection_is_hooked(self, module):
        module.out_proj.register_forward_hook(lambda *_: None)
        assert projections(module) == (
            "by fused_mha's product, apart from the attention: a projection is hooked, replaced, reparametrized, "
            "sharded or incomplete"
        )

    def test_torchs_linear_where_the_rule_prefers_it(self, module, monkeypatch):
        monkeypatch.setattr(linear, "dtypes", lambda: (torch.float16,))
        monkeypatch.setattr(linear, "serves", lambda *_: False)
        assert projections(module) == f"by torch's linear, apart from the attention: {linear.RULE}"

    def test_torchs_linear_beside_another_back_end(self, module):
        with fused_mha.backend("reference"):
            assert projections(module) == "by torch's linear, apart from the attention: the back end is not cpu"

    def test_a_mask_that_needs_a_gradient(self, module):
        mask = torch.zeros(5, 5, requires_grad=True)
        assert "a mask needs a gradient" in projections(module, attn_mask=mask)

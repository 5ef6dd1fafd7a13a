"""The parity kit on odd input: what could make it pass a wrong module, fail a right one, or break."""

import copy

import pytest
import torch
from torch import nn

from fused_mha import MultiHeadAttention
from fused_mha.parity import command as parity
from fused_mha.testing import Case, assert_parity, compare


class HalfAsMuchAgain(nn.MultiheadAttention):
    """Wrong by a factor of 1.5."""

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output * 1.5, weights


def wrong_module(theirs):
    ours = HalfAsMuchAgain(8, 2, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize("huge", [1e20, 1e30])
def test_huge_hidden_keys_do_not_widen_the_tolerance(huge):
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    key[:, 4] = huge
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 4] = True
    with pytest.raises(AssertionError, match="output: largest error"):
        assert_parity(wrong_module(theirs), theirs, query, key, key, key_padding_mask=padding, need_weights=False)


def test_a_positional_mask_of_huge_numbers_does_not_widen_the_tolerance():
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    ours.self_attn = wrong_module(theirs.self_attn)
    mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    with pytest.raises(AssertionError, match="output: largest error"):
        assert_parity(ours, theirs, torch.randn(2, 4, 8), mask)


def test_an_overflow_of_theirs_is_named_and_not_a_tolerance_of_infinity():
    theirs = nn.Linear(4, 4).half()
    x = torch.full((2, 4), 6e4, dtype=torch.half)
    with torch.no_grad():
        theirs.weight.fill_(1.0)
        (problem,) = [c for c in compare(copy.deepcopy(theirs), theirs, x) if not c.agrees]
    assert problem.quantity == "output"
    assert "theirs is not finite" in str(problem)


def test_a_module_that_changes_its_input_differs():
    class Overwrites(MultiHeadAttention):
        def forward(self, query, *args, **kwargs):
            query.mul_(2.0)
            return super().forward(query, *args, **kwargs)

    theirs = nn.MultiheadAttention(8, 2)
    ours = Overwrites(8, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 8)
    with torch.no_grad(), pytest.raises(AssertionError, match="ours changed a tensor that it was given"):
        assert_parity(ours, theirs, x, x, x)


def test_positional_bool_masks_are_taken():
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert_parity(copy.deepcopy(theirs), theirs, torch.randn(2, 4, 8), torch.ones(4, 4, dtype=torch.bool).triu(1))


def test_inputs_by_keyword_have_their_gradients_compared():
    ours, theirs, (query, key, value), _ = Case(sharing="separate").build()
    names = {c.quantity for c in assert_parity(ours, theirs, query=query, key=key, value=value)}
    assert {"grad of query", "grad of key", "grad of value"} <= names


def test_no_tensor_at_all_is_a_type_error():
    with pytest.raises(TypeError, match="no tensor among the arguments"):
        assert_parity(nn.Linear(2, 2), nn.Linear(2, 2))


def test_a_module_that_raises_keeps_its_buffers():
    class Raises(nn.BatchNorm1d):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no result")

    ours, theirs = Raises(4), nn.BatchNorm1d(4)
    with pytest.raises(RuntimeError, match="no result"):
        assert_parity(ours, theirs, torch.randn(8, 4))
    assert ours.num_batches_tracked == 0


def test_outputs_by_name_are_compared_and_other_values_passed_over():
    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "note": "text"}

    theirs = Named(4, 4)
    ours = copy.deepcopy(theirs)
    assert "logits" in {c.quantity for c in assert_parity(ours, theirs, torch.randn(2, 4))}


def test_command_catches_a_module_that_is_wrong_in_inference_alone(monkeypatch, capsys):
    right = MultiHeadAttention.forward

    def forward(self, *args, **kwargs):
        output, weights = right(self, *args, **kwargs)
        return (output if torch.is_grad_enabled() else output * 1.001), weights

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)
    monkeypatch.setattr(parity, "grid", lambda *, full=False: iter([Case(training=False)]))
    assert parity.main(["--dtype", "float32"]) == 1
    assert "output (no_grad): largest error" in capsys.readouterr().out

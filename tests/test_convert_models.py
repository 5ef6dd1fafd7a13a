"""Whole models that were converted: the same numbers, and training, compiling and serving go on."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_mha
from closeness import assert_close_to_oracle
from fused_mha import MultiHeadAttention
from fused_mha.testing import assert_parity


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def transformer(dropout=0.0, batch_first=True):
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 24, dropout=dropout, batch_first=batch_first)


def converted_copy(model):
    ours = copy.deepcopy(model)
    report = fused_mha.convert(ours)
    assert report.skipped == {}
    assert report.changed
    return ours


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_whole_transformer_gives_torchs_outputs_and_gradients(training, batch_first):
    theirs = transformer(batch_first=batch_first).train(training)
    shape = (2, 5, 16) if batch_first else (5, 2, 16)
    assert_parity(converted_copy(theirs), theirs, draw(*shape), draw(*shape, seed=1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning")
def test_whole_transformer_drops_what_torchs_drops_under_one_seed():
    # Sequence first: batch first, torch's attention gives a transpose, and dropout layers after it draw in its order.
    theirs = transformer(dropout=0.3, batch_first=False)
    assert_parity(converted_copy(theirs), theirs, draw(5, 2, 16), draw(4, 2, 16, seed=1))


def test_whole_transformer_with_every_mask():
    theirs = transformer()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    assert_parity(
        converted_copy(theirs),
        theirs,
        draw(2, 5, 16),
        draw(2, 4, 16, seed=1),
        src_mask=torch.zeros(5, 5).fill_diagonal_(0.5),
        tgt_mask=causal,
        tgt_is_causal=True,
        src_key_padding_mask=torch.zeros(2, 5).masked_fill(padding, float("-inf")),
        memory_key_padding_mask=torch.zeros(2, 5).masked_fill(padding, float("-inf")),
    )


def test_whole_transformer_converts_all_six_attentions():
    model = transformer()
    assert fused_mha.convert(model).changed == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]


def test_reverted_transformer_is_torchs_bit_by_bit():
    theirs = transformer()
    ours = converted_copy(theirs)
    fused_mha.revert(ours)
    inputs = draw(2, 5, 16), draw(2, 4, 16, seed=1)
    assert torch.equal(ours(*inputs), theirs(*inputs))
    with torch.no_grad():
        assert torch.equal(ours.eval()(*inputs), theirs.eval()(*inputs))  # torch's fast path again


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x, key_padding_mask=None):
        output, weights = self.attention(x, x, x, key_padding_mask=key_padding_mask)
        return self.head(output), weights


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = draw(4, 5, 16, seed=step, dtype=model.head.weight.dtype)
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), torch.arange(20) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_live_optimizer_goes_on():
    torch.manual_seed(0)
    theirs = Classifier()
    ours, oracle = copy.deepcopy(theirs), copy.deepcopy(theirs).double()

    def trained(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, optimizer, 2)
        if model is ours:
            fused_mha.convert(model)
        before = model.attention.in_proj_weight.detach().clone()
        train(model, optimizer, 2, first=2)
        assert not torch.equal(model.attention.in_proj_weight, before)
        return dict(model.named_parameters())

    assert_close_to_oracle(trained(ours), trained(theirs), lambda: trained(copy.deepcopy(oracle)), terms=20)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_goes_on():
    torch.manual_seed(0)
    model = Classifier()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, everything = draw(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    assert compiled(x, everything)[1].isnan().all()  # torch's answer to rows that are masked everywhere
    fused_mha.convert(model)
    output, weights = compiled(x, everything)
    assert torch.equal(weights, torch.zeros(2, 5, 5))
    assert torch.equal(output, model(x, everything)[0])


def of_wrapper(model, compiler):
    return torch.compile(model, **compiler)


def of_method(model, compiler):
    model.compile(**compiler)
    return model


def of_wrapper_inside(model, compiler):
    return nn.Sequential(torch.compile(model, **compiler))


def of_method_inside(model, compiler):
    model.compile(**compiler)
    return nn.Sequential(model)


def of_function(model, compiler):
    def step(x):
        return model(x)

    return torch.compile(step, **compiler)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled_by", [of_wrapper, of_method, of_wrapper_inside, of_method_inside, of_function])
@pytest.mark.parametrize("swaps", [(fused_mha.convert, fused_mha.revert), (fused_mha.revert, fused_mha.convert)])
def test_graphs_that_were_compiled_before_are_compiled_anew(swaps, compiled_by):
    # Without guards on modules torch sees no change by itself; with them, before torch 2.13, not every one.
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    operators = []

    def record(graph, example_inputs, **_):
        operators.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    model = Classifier()
    if swaps[0] is fused_mha.revert:
        fused_mha.convert(model)
    compiled, x = compiled_by(model, {"backend": record, "options": options}), draw(2, 5, 16)
    results = [compiled(x)[0]]
    for swap in swaps:
        assert swap(model).changed == ["attention"]
        results.append(compiled(x)[0])
    assert len(operators) == 3
    assert operators[0] == operators[2] != operators[1]
    torch.testing.assert_close(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_conversion_of_a_model_does_not_import_the_compiler():
    program = """
import sys, torch, fused_mha
assert fused_mha.convert(torch.nn.TransformerEncoderLayer(8, 2)).changed == ["self_attn"]
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_conversion_of_the_compiled_wrapper_reaches_the_model():
    model = Classifier()
    compiled = torch.compile(model, backend="eager")
    assert fused_mha.convert(compiled).changed == ["_orig_mod.attention"]
    assert type(model.attention) is MultiHeadAttention


def test_checkpoints_load_both_ways():
    theirs, ours = Classifier(), Classifier()
    fused_mha.convert(ours)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    assert str(ours.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert torch.equal(ours.attention.in_proj_weight, theirs.attention.in_proj_weight)
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"


def test_a_converted_model_survives_deepcopy_and_pickle():
    model = Classifier()
    fused_mha.convert(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = draw(2, 5, 16)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(again.attention) is MultiHeadAttention
        assert len(again.attention._forward_pre_hooks) == 1
        assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_converted_and_reverted_model_keeps_parity_and_mode(training):
    torch.manual_seed(0)
    model = Classifier().train(training)
    theirs = copy.deepcopy(model)
    fused_mha.convert(model)
    assert_parity(model, theirs, draw(2, 5, 16))
    fused_mha.revert(model)
    assert_parity(model, theirs, draw(2, 5, 16))
    assert model.training is training

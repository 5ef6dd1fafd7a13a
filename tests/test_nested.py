"""Nested tensors: the module on ragged batches, strided and jagged, in training and inference, and in an encoder."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import fused_mha
from fused_mha import MultiHeadAttention, RotaryEmbedding
from fused_mha.module import nested as nested_input
from fused_mha.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

E, H = 16, 4
LENGTHS, KEY_LENGTHS = (7, 3, 1, 5), (2, 1, 9, 4)
LAYOUTS = pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "virtual keys": {"add_bias_kv": True, "add_zero_attn": True},
    "rope, grouped heads, norm": {"rope": RotaryEmbedding(4), "num_kv_heads": 2, "qk_norm": "rms"},
    "softcap, sinks, window, ALiBi": {"softcap": 5.0, "sinks": True, "window": (2, 1), "alibi": True},
    "gate": {"gate": True},
}


def nested(sequences, layout=torch.strided, requires_grad=False) -> Tensor:
    return torch.nested.nested_tensor(sequences, layout=layout, requires_grad=requires_grad)


def sequences(lengths=LENGTHS, size=E):
    return [torch.randn(length, size) for length in lengths]


def randomized(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def gradients(module, inputs, outputs, cotangents):
    module.zero_grad()
    torch.autograd.backward(outputs, cotangents)
    return [x.grad for x in (*inputs, *module.parameters())]


@LAYOUTS
@pytest.mark.parametrize("back_end", ["cpu", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_self_attention_is_that_of_each_sequence_alone(options, is_causal, back_end, layout):
    with fused_mha.backend(back_end):
        _assert_is_of_each_sequence(options, is_causal, layout)


def _assert_is_of_each_sequence(options, is_causal, layout):
    module = randomized(MultiHeadAttention(E, H, batch_first=True, **options))
    rows = sequences()
    x = nested(rows, layout, requires_grad=True)
    settings = {"need_weights": False, "is_causal": is_causal}
    output, weights = module(x, x, x, **settings)
    assert weights is None
    assert output.layout == layout
    outputs = output.unbind()
    cotangents = [torch.randn_like(row) for row in outputs]
    of_input, *of_parameters = gradients(module, [x], outputs, cotangents)
    alone = [row.clone().requires_grad_() for row in rows]
    expected = [module(row, row, row, **settings)[0] for row in alone]
    of_rows = gradients(module, alone, expected, cotangents)
    torch.testing.assert_close([*outputs], expected)
    torch.testing.assert_close([*of_input.unbind(), *of_parameters], of_rows, rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_cross_attention_is_that_of_each_pair_of_sequences(layout):
    module = randomized(MultiHeadAttention(E, H, kdim=6, vdim=10, batch_first=True))
    rows = [sequences(), sequences(KEY_LENGTHS, 6), sequences(KEY_LENGTHS, 10)]
    inputs = [nested(of, layout, requires_grad=True) for of in rows]
    output, _ = module(*inputs, need_weights=False)
    outputs = output.unbind()
    cotangents = [torch.randn_like(row) for row in outputs]
    of_inputs = gradients(module, inputs, outputs, cotangents)
    alone = [[row.clone().requires_grad_() for row in of] for of in rows]
    expected = [module(*of, need_weights=False)[0] for of in zip(*alone, strict=True)]
    of_rows = gradients(module, [row for of in alone for row in of], expected, cotangents)
    torch.testing.assert_close([*outputs], expected)
    unbound = [row for x in of_inputs[:3] for row in x.unbind()]
    torch.testing.assert_close([*unbound, *of_inputs[3:]], of_rows, rtol=1e-4, atol=1e-5)


@LAYOUTS
def test_dropout_and_every_mode_give_one_result(layout):
    module = MultiHeadAttention(E, H, dropout=0.5, batch_first=True)
    x = nested(sequences(), layout)

    def call(training, grad):
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            return torch.cat([row.detach() for row in module.train(training)(x, x, x, need_weights=False)[0].unbind()])

    assert torch.equal(call(True, True), call(True, False))
    assert torch.equal(call(False, True), call(False, False))
    assert not torch.equal(call(True, True), call(False, True))


@LAYOUTS
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_encoder_takes_nested_input(layout, training):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).train(training)
    ours = copy.deepcopy(theirs)
    fused_mha.convert(ours)
    rows = sequences()
    padding = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.set_grad_enabled(training):
        output = torch.cat([*ours(nested(rows, layout)).unbind()])
        expected = theirs(padded, src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(output, expected)
        if training:
            cotangent = torch.randn_like(output)
            for result in (output, expected):
                result.backward(cotangent)
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break():
    module, graphs = MultiHeadAttention(E, H, batch_first=True), []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for i in range(10):
        x = nested(sequences((3 + i, 5, 2, 4)), torch.jagged, requires_grad=True)
        output, _ = compiled(x, x, x, need_weights=False)
        torch.testing.assert_close(output.values(), module(x, x, x, need_weights=False)[0].values())
    assert len(graphs) <= 3


def test_other_values_than_keys_compile_too():
    module = MultiHeadAttention(E, H, batch_first=True)
    key = nested(sequences(), torch.jagged)
    value = torch.nested.nested_tensor_from_jagged(torch.randn(key.values().shape), key.offsets())
    torch._dynamo.reset()
    output, _ = torch.compile(module, fullgraph=True, backend="aot_eager")(key, key, value, need_weights=False)
    torch.testing.assert_close(output.values(), module(key, key, value, need_weights=False)[0].values())


def test_jagged_output_is_of_the_sizes_of_the_query():
    module, x = MultiHeadAttention(E, H, batch_first=True), nested(sequences(), torch.jagged)
    output, _ = module(x, x, x, need_weights=False)
    assert output.to_padded_tensor(0.0).shape == (4, 7, E)
    torch.testing.assert_close((output + x).values(), output.values() + x.values())
    torch.testing.assert_close((x + output).to_padded_tensor(0.0).shape, torch.Size((4, 7, E)))


@pytest.mark.parametrize("options", [{}, {"rope": RotaryEmbedding(4)}], ids=["plain", "rope"])
def test_offsets_of_int32_and_rows_behind_the_last_are_served(options):
    module, rows = MultiHeadAttention(E, H, batch_first=True, **options), torch.randn(9, E)
    for ends in ((0, 4, 9), (0, 4, 7)):
        x = torch.nested.nested_tensor_from_jagged(rows, torch.tensor(ends, dtype=torch.int32))
        output, _ = module(x, x, x, need_weights=False)
        for begin, end in itertools.pairwise(ends):
            sequence = rows[begin:end]
            torch.testing.assert_close(output.values()[begin:end], module(sequence, sequence, sequence)[0])


@LAYOUTS
def test_input_of_inference_mode_is_recorded(layout):
    module = MultiHeadAttention(E, H, batch_first=True)
    with torch.inference_mode():
        x = nested(sequences(), layout)
    output, _ = module(x, x, x, need_weights=False)
    torch.cat(output.unbind()).sum().backward()
    assert module.in_proj_weight.grad is not None


def test_without_kernels_of_ours_torchs_are_given_padding(monkeypatch):
    module, x = MultiHeadAttention(E, H, batch_first=True), nested(sequences())
    with torch.no_grad():
        expected, _ = module(x, x, x, need_weights=False)
        monkeypatch.setattr(nested_input, "_CORES", ())
        monkeypatch.setattr(nested_input, "packed", None)
        output, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close([*output.unbind()], [*expected.unbind()])


@pytest.mark.parametrize(
    ("need_weights", "average"), [(True, True), (True, False), (False, True)], ids=["averaged", "per head", "none"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_strided_self_attention_in_inference_agrees_with_torch(mode, need_weights, average):
    ours, theirs, _, _ = Case(training=False).build()
    x = nested(sequences())
    arguments = {"need_weights": need_weights, "average_attn_weights": average}
    with mode():
        output, weights = ours(x, x, x, **arguments)
        expected, expected_weights = theirs(x, x, x, **arguments)
    torch.testing.assert_close([*output.unbind()], [*expected.unbind()])
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


def test_a_forward_that_calls_ours_is_called_once():
    class Doubled(MultiHeadAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2.0 * output, weights

    ours = MultiHeadAttention(E, H, batch_first=True).eval()
    doubled = copy.deepcopy(ours)
    doubled.__class__ = Doubled
    x = nested(sequences())
    with torch.no_grad():
        (output, weights), (expected, expected_weights) = doubled(x, x, x), ours(x, x, x)
    torch.testing.assert_close(output.to_padded_tensor(0.0), 2.0 * expected.to_padded_tensor(0.0))
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("dense key", "all three of them must be nested"),
        ("fewer sequences", "they must be of as many sequences; got 4, 3 and 3"),
        ("other lengths of value", r"key and value must have the same lengths; got \[2, 1, 9, 4\] and \[7, 3, 1, 5\]"),
        ("heads", "each must be of N sequences"),
        ("holes", r"one has holes: call contiguous\(\) on it before"),
        ("padding", "key_padding_mask and attn_mask must be None"),
        ("mask", "key_padding_mask and attn_mask must be None"),
        ("sequence first", "the module must be batch_first=True"),
        ("weights with gradients", "need_weights must be False, since weights have no nested form"),
        ("weights of jagged", "need_weights must be False, since weights have no nested form"),
    ],
)
def test_other_nested_input_is_an_assertion_error_that_says_why(change, text):
    module = MultiHeadAttention(E, H, batch_first=change != "sequence first").eval()
    query = key = value = nested(sequences(), torch.jagged if change == "weights of jagged" else torch.strided)
    arguments = {"need_weights": change.startswith("weights")}
    if change == "dense key":
        key = value = torch.randn(4, 7, E)
    elif change == "fewer sequences":
        key = value = nested(sequences(LENGTHS[:3]))
    elif change == "other lengths of value":
        key = nested(sequences(KEY_LENGTHS))
    elif change == "heads":
        query = key = value = nested([torch.randn(length, 2, 8) for length in LENGTHS])
    elif change == "holes":
        starts, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
        query = key = value = torch.nested.narrow(torch.randn(2, 6, E), 1, starts, lengths, layout=torch.jagged)
    elif change == "padding":
        arguments["key_padding_mask"] = torch.zeros(4, 7, dtype=torch.bool)
    elif change == "mask":
        arguments["attn_mask"] = torch.zeros(7, 7)
    with torch.set_grad_enabled(change == "weights with gradients"), pytest.raises(AssertionError, match=text):
        module(query, key, value, **arguments)


def test_rope_refuses_keys_of_other_lengths():
    module = MultiHeadAttention(E, H, batch_first=True, rope=RotaryEmbedding(4))
    query, key = nested(sequences((2, 3))), nested(sequences((3, 2)))
    with pytest.raises(ValueError, match="key must have query's lengths"):
        module(query, key, key, need_weights=False)

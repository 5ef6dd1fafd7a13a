"""The module inside torch's own Transformer layers, which read its parameters and hand it nested tensors."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_mha
from fused_mha import MultiHeadAttention
from fused_mha.testing import Case, assert_parity

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

LENGTHS = (7, 3, 5)
PADDING = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]  # left-aligned, as nn.TransformerEncoder asks


@pytest.fixture
def forward_calls(monkeypatch) -> list[MultiHeadAttention]:
    """The modules whose forward was called, in order."""
    calls = []
    forward = MultiHeadAttention.forward

    def counting(self, query, *args, **kwargs):
        if not query.is_nested:  # a nested call makes a padded one
            calls.append(self)
        return forward(self, query, *args, **kwargs)

    monkeypatch.setattr(MultiHeadAttention, "forward", counting)
    return calls


def _pair(build, **arguments) -> tuple[nn.Module, nn.Module]:
    """A converted model and torch's, in evaluation and with equal parameters, none of them zero."""
    theirs = build(**arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = copy.deepcopy(theirs)
    assert fused_mha.convert(ours).changed
    return ours, theirs


def _layer(**arguments) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        **{"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True} | arguments
    )


def _encoder(**arguments) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(_layer(**arguments), num_layers=2)


def _decoder_layer(**arguments) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, **arguments)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [None, "src_mask", "src_key_padding_mask", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_encoder_layer_in_eval_calls_our_forward(forward_calls, norm_first, masked, dtype):
    ours, theirs = _pair(_layer, norm_first=norm_first, dtype=dtype)
    x = torch.randn(3, 7, 8, dtype=dtype)
    masks = {}
    if masked in ("src_mask", "both"):
        masks["src_mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1)
    if masked in ("src_key_padding_mask", "both"):
        masks["src_key_padding_mask"] = PADDING
    with torch.no_grad():
        assert_parity(ours, theirs, x, **masks)
    assert forward_calls == [ours.self_attn]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("with_padding", [False, True])
def test_encoder_in_eval_calls_our_forward_in_every_layer(forward_calls, with_padding, norm_first):
    ours, theirs = _pair(_encoder, norm_first=norm_first)
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        assert_parity(ours, theirs, x, src_key_padding_mask=PADDING if with_padding else None)
    assert forward_calls == [layer.self_attn for layer in ours.layers]


def test_encoder_hands_us_a_nested_tensor_and_gives_zeros_at_padded_positions(monkeypatch):
    ours, theirs = _pair(_encoder)
    nested_calls = []
    ours.layers[0].self_attn.register_forward_pre_hook(lambda _, args: nested_calls.append(args[0].is_nested))
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        output = ours(x, src_key_padding_mask=PADDING)
        expected = theirs(x, src_key_padding_mask=PADDING)
    assert nested_calls == [True]
    assert torch.equal(output[PADDING], torch.zeros(int(PADDING.sum()), 8))
    assert torch.equal(expected[PADDING], output[PADDING])
    torch.testing.assert_close(output, expected)


def test_encoder_in_eval_gives_what_it_gives_in_training():
    ours, _ = _pair(_encoder, dropout=0.0)
    x = torch.randn(3, 7, 8)
    expected = ours.train()(x, src_key_padding_mask=PADDING)
    with torch.no_grad():
        output = ours.eval()(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(output[~PADDING], expected[~PADDING])


@pytest.mark.parametrize(
    "arguments", [{"batch_first": False}, {"nhead": 1}, {"bias": False}, {"activation": "gelu"}], ids=str
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning")
def test_encoders_of_other_configurations_agree_with_torch(forward_calls, arguments):
    ours, theirs = _pair(_encoder, **arguments)
    x = torch.randn(3, 7, 8) if arguments.get("batch_first", True) else torch.randn(7, 3, 8)
    with torch.no_grad():
        assert_parity(ours, theirs, x, src_key_padding_mask=PADDING)
    assert forward_calls == [layer.self_attn for layer in ours.layers]


@pytest.mark.parametrize("training", [False, True])
def test_encoder_with_gradients_agrees_with_torch(training):
    ours, theirs = _pair(_encoder, dropout=0.0)
    x = torch.randn(3, 7, 8)
    assert_parity(ours.train(training), theirs.train(training), x, src_key_padding_mask=PADDING)
    assert_parity(ours, theirs, x, mask=nn.Transformer.generate_square_subsequent_mask(7), is_causal=True)


def test_decoder_layer_in_eval_calls_our_forward(forward_calls):
    ours, theirs = _pair(_decoder_layer)
    target, memory = torch.randn(3, 4, 8), torch.randn(3, 7, 8)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    with torch.no_grad():
        assert_parity(ours, theirs, target, memory, tgt_mask=causal, memory_key_padding_mask=PADDING)
    assert forward_calls == [ours.self_attn, ours.multihead_attn]


def test_whole_transformer_agrees_with_torch():
    ours, theirs = _pair(nn.Transformer, d_model=8, nhead=2, dim_feedforward=16, num_encoder_layers=1, batch_first=True)
    source, target = torch.randn(3, 7, 8), torch.randn(3, 4, 8)
    masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    assert_parity(ours, theirs, source, target, **masks)
    with torch.no_grad():
        assert_parity(ours, theirs, source, target, **masks)


def _nested(lengths=LENGTHS, embed_dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, embed_dim) for n in lengths], dtype=dtype)


@pytest.mark.parametrize(
    ("need_weights", "average"), [(True, True), (True, False), (False, True)], ids=["averaged", "per head", "none"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nested_self_attention_agrees_with_torch(mode, need_weights, average):
    ours, theirs, _, _ = Case(training=False).build()
    x = _nested()
    arguments = {"need_weights": need_weights, "average_attn_weights": average}
    with mode():
        output, weights = ours(x, x, x, **arguments)
        expected, expected_weights = theirs(x, x, x, **arguments)
    assert output.is_nested
    for row, expected_row in zip(output.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(row, expected_row)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)


def test_nested_self_attention_is_that_of_each_sequence_alone():
    module = MultiHeadAttention(16, 4, batch_first=True)
    x = _nested((1, 4, 2))
    with torch.no_grad():
        output, _ = module(x, x, x, is_causal=True, need_weights=False)
        for row, sequence in zip(output.unbind(), x.unbind(), strict=True):
            torch.testing.assert_close(row, module(sequence, sequence, sequence, is_causal=True)[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("cross", "query, key and value must be the same nested tensor"),
        ("padding", "key_padding_mask and attn_mask must be None"),
        ("mask", "key_padding_mask and attn_mask must be None"),
        ("sequence first", "the module must be batch_first=True"),
        ("with gradients", "it works in inference only"),
        ("jagged", "the layout must be torch.strided, got torch.jagged"),
    ],
)
def test_other_nested_input_is_an_assertion_error_that_says_why(change, text):
    module = MultiHeadAttention(16, 4, batch_first=change != "sequence first").eval()
    x = _nested()
    if change == "jagged":
        x = torch.nested.nested_tensor([torch.randn(n, 16) for n in LENGTHS], layout=torch.jagged)
    y = _nested() if change == "cross" else x
    arguments = {}
    if change == "padding":
        arguments["key_padding_mask"] = PADDING
    if change == "mask":
        arguments["attn_mask"] = torch.zeros(7, 7)
    with torch.set_grad_enabled(change == "with gradients"), pytest.raises(AssertionError, match=text):
        module(x, y, y, **arguments)


def test_frozen_encoder_takes_padding_with_grad_mode_on():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    ours = copy.deepcopy(theirs)
    fused_mha.convert(ours)
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    torch.testing.assert_close(ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding))

"""The module inside torch's own Transformer layers, which read its parameters and hand it nested tensors."""

import copy

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention
from fused_mha.testing import assert_parity

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

LENGTHS = (7, 3, 5)
PADDING = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]  # left-aligned, as nn.TransformerEncoder asks


@pytest.fixture
def forward_calls(monkeypatch) -> list[MultiHeadAttention]:
    """The modules whose forward was called, in order."""
    calls = []
    forward = MultiHeadAttention.forward

    def counting(self, query, *args, **kwargs):
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


def test_frozen_encoder_takes_padding_with_grad_mode_on():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    ours = copy.deepcopy(theirs)
    fused_mha.convert(ours)
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    torch.testing.assert_close(ours(x, src_key_padding_mask=padding), theirs(x, src_key_padding_mask=padding))

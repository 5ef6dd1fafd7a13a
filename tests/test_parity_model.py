"""`python -m fused_mha.parity --model`: a user's own model before and after `convert`."""

import json
import sys

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention
from fused_mha.parity import command

MODES = ["training", "evaluation", "inference"]


class Classifier(nn.Module):
    """Indices in, a nested result out: logits, and of the attention weights one tensor and None."""

    def __init__(self, attention=nn.MultiheadAttention):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = attention(16, 4, dropout=0.1, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens, padding=None):
        x = self.embedding(tokens)
        attended, weights = self.attention(x, x, x, key_padding_mask=padding)
        logits = self.head(self.layer(x + attended))
        return {"logits": logits, "attentions": [weights, None], "best": logits.argmax(-1), "words": "not compared"}


class Subclass(MultiHeadAttention):
    pass


@pytest.fixture
def factories(monkeypatch):
    """A module of factories that can be named as ``models:factory``."""
    module = type(sys)("models")
    tokens = torch.arange(15).reshape(3, 5) % 11
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    x = torch.randn(5, 2, 16)
    module.classifier = lambda: (Classifier(), tokens)
    module.padded = lambda: (Classifier(), (tokens,), {"padding": padding})
    module.by_keyword = lambda: (Classifier(), {"tokens": tokens, "padding": padding})
    module.ours = lambda: (Classifier(MultiHeadAttention), tokens)
    module.layer = lambda: (nn.MultiheadAttention(16, 4), (x, x, x))
    module.subclass = lambda: (Subclass(16, 4), (x, x, x))
    module.linear = lambda: (nn.Linear(16, 4), x)
    module.model_alone = lambda: nn.MultiheadAttention(16, 4)
    module.other_order = lambda: (x, nn.MultiheadAttention(16, 4))
    module.number = 3

    class Namespace:
        classifier = staticmethod(module.classifier)

    def broken():
        raise OSError("no weights")

    module.Namespace, module.broken = Namespace, broken
    monkeypatch.setitem(sys.modules, "models", module)
    return module


@pytest.mark.parametrize("name", ["classifier", "padded", "by_keyword", "Namespace.classifier"])
def test_a_right_model_agrees_in_every_mode(factories, name, capsys):
    assert command.main(["--model", f"models:{name}"]) == 0
    out = capsys.readouterr().out
    assert "changed 2, skipped 0\n  changed  attention\n  changed  layer.self_attn\n" in out
    assert " after    before tolerance\n" in out
    for mode in MODES:
        assert f"\nfloat32   {mode:<13}    1/1   " in out
    assert out.endswith("\n3 of 3 runs agree\n")


def test_every_result_and_gradient_is_compared(factories, tmp_path):
    path = tmp_path / "parity.json"
    assert command.main(["--model", "models:padded", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["model"] == "models:padded"
    assert (document["changed"], document["skipped"]) == (["attention", "layer.self_attn"], {})
    quantities = [[c["quantity"] for c in result["comparisons"]] for result in document["results"]]
    outputs = ["state_dict", "logits", "attentions.0", "attentions.1", "best"]
    gradients = [f"grad of {name}" for name, _ in Classifier().named_parameters()]
    assert quantities == [outputs + gradients, outputs + gradients, outputs]


def test_a_wrong_model_fails_in_every_mode_and_says_where(factories, monkeypatch, capsys):
    right = MultiHeadAttention.forward

    def forward(self, *args, **kwargs):
        output, weights = right(self, *args, **kwargs)
        return output * 1.001, weights

    monkeypatch.setattr(MultiHeadAttention, "forward", forward)
    assert command.main(["--model", "models:layer"]) == 1
    out = capsys.readouterr().out
    for mode in MODES:
        assert f"\nDIFFERS  float32, {mode}  (seed 0)\n  output: largest error " in out
    assert out.endswith("\n0 of 3 runs agree\n")


def test_a_model_of_ours_is_compared_with_torchs(factories, capsys):
    before = []
    compare = fused_mha.parity.model.compare

    def spy(ours, theirs, *inputs, **keywords):
        before.append((type(ours.attention), type(theirs.attention)))
        return compare(ours, theirs, *inputs, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_mha.parity.model, "compare", spy)
        assert command.main(["--model", "models:ours"]) == 0
    assert before == [(MultiHeadAttention, nn.MultiheadAttention)] * 3


def test_dtypes_cast_the_model_and_its_inputs(factories, capsys):
    assert command.main(["--model", "models:layer", "--dtype", "bfloat16", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if "1/1" in line] == [
        [dtype, mode] for dtype in ("bfloat16", "float64") for mode in MODES
    ]


def test_the_seed_draws_the_parameters(factories, tmp_path):
    documents = []
    for seed in ("0", "1", "0"):
        path = tmp_path / "parity.json"
        command.main(["--model", "models:classifier", "--seed", seed, "--json", str(path)])
        documents.append([result["comparisons"] for result in json.loads(path.read_text())["results"]])
    assert documents[0] == documents[2] != documents[1]


@pytest.mark.parametrize(
    ("specification", "problem"),
    [
        ("models", "expected package.module:factory, got 'models'"),
        (":factory", "expected package.module:factory, got ':factory'"),
        ("no_such_module:factory", "'no_such_module:factory': No module named 'no_such_module'"),
        ("models:factory", "'models:factory': module 'models' has no attribute 'factory'"),
        ("models:number", "got int, which can't be called"),
        ("models:model_alone", "(model, inputs) or (model, inputs, keywords); it returned MultiheadAttention"),
        ("models:other_order", "it returned ['Tensor', 'MultiheadAttention']"),
        ("models:linear", "nothing to convert: Linear has no torch.nn.MultiheadAttention"),
        ("models:subclass", "is a Subclass, a subclass that torch.nn.MultiheadAttention can't express"),
    ],
    ids=str,
)
def test_a_wrong_specification_ends_with_a_line(factories, specification, problem, capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(["--model", specification])
    assert raised.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "argument --model: " in error
    assert problem in error


def test_an_error_of_the_factory_is_its_own(factories):
    with pytest.raises(OSError, match="no weights"):
        command.main(["--model", "models:broken"])


def test_the_larger_grid_is_none_of_a_model(factories, capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", "models:classifier", "--full"])
    assert "argument --full: expected without --model" in capsys.readouterr().err

"""Checkpoints of torch's module in modules with options, of modules with options, and pooled key heads."""

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention

E, H = 12, 4
ROPE = fused_mha.RotaryEmbedding(2)
FROM_TORCH = {
    "rope": {"rope": ROPE},
    "rms": {"qk_norm": "rms"},
    "layer": {"qk_norm": "layer"},
    "l2": {"qk_norm": "l2"},
    "window": {"window": (2, 0)},
    "all": {"rope": ROPE, "qk_norm": "layer", "window": (2, 0)},
}


@pytest.mark.parametrize("prefix", ["", "layers.0.self_attn."])
@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "vdim": 7}, {"bias": False, "add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("options", FROM_TORCH.values(), ids=FROM_TORCH)
def test_a_checkpoint_of_torchs_module_loads_and_the_rest_stays(options, arguments, prefix):
    if "rope" in options and "kdim" in arguments:
        arguments = {}
    theirs = nn.MultiheadAttention(E, H, **arguments)
    ours = MultiHeadAttention(E, H, **arguments, **options)
    initial = {name: x.clone() for name, x in ours.state_dict().items()}
    holder = ours
    for name in reversed(prefix.split(".")[:-1]):
        holder = nn.ModuleDict({name: holder})
    for state_dict in (theirs.state_dict(), dict(theirs.state_dict())):  # the second without versions
        holder.load_state_dict({prefix + name: x for name, x in state_dict.items()}, strict=True)
        holder.load_state_dict(holder.state_dict(), strict=True)
    for name, x in ours.state_dict().items():
        assert torch.equal(x, theirs.state_dict().get(name, initial[name])), name


def test_a_checkpoint_of_ours_without_options_is_torchs():
    plain = MultiHeadAttention(E, H)
    assert plain.state_dict()._metadata[""]["version"] == 1
    MultiHeadAttention(E, H, qk_norm="rms").load_state_dict(plain.state_dict())


@pytest.mark.parametrize("keeps_versions", [True, False])
def test_a_checkpoint_of_other_options_does_not_fit(keeps_versions):
    state_dict = MultiHeadAttention(E, H, qk_norm="rms").state_dict()
    if not keeps_versions:
        state_dict = dict(state_dict)
    for options in ({"qk_norm": "layer"}, {"qk_norm": "rms", "gate": True}):
        with pytest.raises(RuntimeError, match="Missing key"):
            MultiHeadAttention(E, H, **options).load_state_dict(state_dict)
    without_options = MultiHeadAttention(E, H)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"q_norm_weight", "k_norm_weight"'):
        without_options.load_state_dict(state_dict)


def test_a_module_with_options_would_have_had_its_norms_in_the_checkpoint():
    without_names = MultiHeadAttention(E, H, rope=ROPE).state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"q_norm_weight", "k_norm_weight"'):
        MultiHeadAttention(E, H, qk_norm="rms").load_state_dict(without_names)


def test_a_gate_has_to_be_in_the_checkpoint():
    with pytest.raises(RuntimeError, match=r'Missing key.*"gate_proj_weight", "gate_proj_bias"'):
        MultiHeadAttention(E, H, gate=True).load_state_dict(nn.MultiheadAttention(E, H).state_dict())


def test_what_torchs_own_names_lack_is_still_missed():
    state_dict = nn.MultiheadAttention(E, H).state_dict()
    del state_dict["out_proj.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "out_proj.bias". $'):
        MultiHeadAttention(E, H, qk_norm="rms").load_state_dict(state_dict)


def test_a_module_of_another_number_of_key_heads_takes_no_checkpoint_unpooled():
    with pytest.raises(RuntimeError, match="size mismatch for in_proj_weight"):
        MultiHeadAttention(E, H, num_kv_heads=2).load_state_dict(nn.MultiheadAttention(E, H).state_dict())


@pytest.mark.parametrize("arguments", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}], ids=["packed", "separate"])
def test_pooled_heads_are_the_means_of_their_groups(arguments):
    theirs = nn.MultiheadAttention(E, H, **arguments)
    nn.init.normal_(theirs.in_proj_bias)
    ours = MultiHeadAttention(E, H, num_kv_heads=2, **arguments)
    given = theirs.state_dict()
    ours.load_state_dict(fused_mha.pool_key_heads(given, H, 2))
    D = E // H

    def heads(state_dict, role, number):
        index = "qkv".index(role)
        if "in_proj_weight" in state_dict:
            sizes = [E, (len(state_dict["in_proj_weight"]) - E) // 2] * 2
            weight = state_dict["in_proj_weight"].split([*sizes[:2], sizes[1]])[index]
        else:
            weight = state_dict[f"{role}_proj_weight"]
        rest = (len(state_dict["in_proj_bias"]) - E) // 2
        bias = state_dict["in_proj_bias"].split([E, rest, rest])[index]
        return torch.cat((weight, bias[:, None]), 1).view(number, D, -1)

    pooled = ours.state_dict()
    assert torch.equal(heads(pooled, "q", H), heads(given, "q", H))
    for role in "kv":
        expected = heads(given, role, H)
        expected = torch.stack([expected[:2].mean(0), expected[2:].mean(0)])
        torch.testing.assert_close(heads(pooled, role, 2), expected)
    for name in ("bias_k", "bias_v"):
        if name in given:
            torch.testing.assert_close(pooled[name].view(2, D), given[name].view(2, 2, D).mean(1))
    assert torch.equal(pooled["out_proj.weight"], given["out_proj.weight"])


def test_pooling_equal_heads_changes_no_result():
    theirs = nn.MultiheadAttention(E, H, batch_first=True)
    with torch.no_grad():
        for weight in theirs.in_proj_weight.chunk(3)[1:]:
            of_heads = weight.view(2, 2, E // H, E)
            of_heads[:, 1] = of_heads[:, 0]
    ours = MultiHeadAttention(E, H, num_kv_heads=2, batch_first=True)
    ours.load_state_dict(fused_mha.pool_key_heads(theirs.state_dict(), H, 2))
    x = torch.randn(2, 5, E)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


def test_pooling_takes_one_module_of_a_model_and_leaves_what_it_was_given():
    model = nn.TransformerEncoderLayer(E, H)
    given = model.state_dict()
    pooled = fused_mha.pool_key_heads(given, H, 1, prefix="self_attn.")
    assert pooled["self_attn.in_proj_weight"].shape == (E + 2 * E // H, E)
    assert given["self_attn.in_proj_weight"].shape == (3 * E, E)
    assert all(pooled[name] is x for name, x in given.items() if "in_proj" not in name)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 4; got 3"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must divide num_heads = 4; got 0"),
        ({"num_heads": 8, "num_kv_heads": 2}, ValueError, r"divide dimension 0 of in_proj_weight, \(12, 12\); got 8"),
        ({"prefix": "attn."}, KeyError, "state_dict must have attn.in_proj_weight or attn.k_proj_weight; got"),
    ],
    ids=str,
)
def test_a_mistake_in_pooling_is_named(arguments, error, text):
    state_dict = nn.MultiheadAttention(E, H).state_dict()
    with pytest.raises(error, match=text):
        fused_mha.pool_key_heads(state_dict, **{"num_heads": H, "num_kv_heads": 2} | arguments)

"""`RotaryEmbedding`: angles by hand and by the formulas of the papers, layouts, scalings, copies, errors."""

import copy
import math
import pickle

import pytest
import torch

import fused_mha
from fused_mha import LinearScaling, Llama3Scaling, NTKScaling, RotaryEmbedding, YaRNScaling

LAYOUTS = ("half", "interleaved")


def frequencies(rope):
    """Of each pair, by the angle of its first turn, and what cos and sin are multiplied by."""
    x = torch.zeros(1, 1, 1, rope.dim, dtype=torch.float64)
    x[..., : rope.dim // 2] = 1.0
    turned = rope(x, torch.tensor([1]))[0, 0, 0]
    a, b = turned.chunk(2)
    return torch.atan2(b, a).tolist(), torch.hypot(a, b).tolist()


def test_a_pair_is_turned_by_its_position():
    rope = RotaryEmbedding(2)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64).view(1, 3, 1, 2)
    expected = [[1.0, 0.0], [math.cos(1), math.sin(1)], [-2 * math.sin(2), 2 * math.cos(2)]]
    torch.testing.assert_close(rope(x)[0, :, 0], torch.tensor(expected, dtype=torch.float64))


def test_pairs_turn_by_a_geometric_sequence_of_angles():
    found, _ = frequencies(RotaryEmbedding(8))
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-12)
    found, _ = frequencies(RotaryEmbedding(4, base=16.0))
    assert found == pytest.approx([1.0, 0.25], rel=1e-12)


def test_the_layouts_are_permutations_of_one_another():
    x = torch.randn(2, 5, 3, 8)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # a pair side by side
    half, interleaved = (RotaryEmbedding(8, layout=layout) for layout in LAYOUTS)
    torch.testing.assert_close(half(x)[..., order], interleaved(x[..., order]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_components_beyond_dim_stay(layout):
    x = torch.randn(2, 5, 3, 10)
    rope = RotaryEmbedding(6, layout=layout)
    turned = rope(x)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[..., :6], rope(x[..., :6]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_depend_on_distances_alone(layout):
    rope = RotaryEmbedding(8, layout=layout)
    query, key = torch.randn(2, 1, 6, 1, 8, dtype=torch.float64)

    def scores(positions):
        return torch.einsum("nlhd,nshd->ls", rope(query, positions), rope(key, positions))

    for shift in (1000, -1000):
        torch.testing.assert_close(scores(torch.arange(6)), scores(torch.arange(6) + shift))


def test_positions_that_are_given_are_those_that_are_counted():
    rope, x = RotaryEmbedding(8), torch.randn(2, 5, 3, 8)
    assert torch.equal(rope(x, torch.arange(5)), rope(x))
    of_each = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 3, 0, 1]])
    turned = rope(x, of_each)
    for n in range(2):
        assert torch.equal(turned[n : n + 1], rope(x[n : n + 1], of_each[n]))


def test_far_positions_are_as_exact_as_near_ones():
    # in fp32 the angle itself would be wrong by 1e-2 here
    rope, x = RotaryEmbedding(2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    position = 1_000_003
    turned = rope(x, torch.tensor([position])).flatten()
    assert turned.tolist() == pytest.approx([math.cos(position), math.sin(position)], abs=1e-7)


def test_a_longer_table_takes_the_place_of_a_short_one():
    rope = RotaryEmbedding(4)
    short, long = torch.randn(1, 3, 1, 4), torch.randn(1, 700, 1, 4)
    before = rope(short)
    assert torch.equal(rope(long), rope(long, torch.arange(700)))
    assert torch.equal(rope(short), before)


def test_a_table_made_in_inference_mode_serves_training():
    rope, x = RotaryEmbedding(4), torch.randn(1, 3, 1, 4)
    with torch.inference_mode():
        rope(x)
    leaf = x.clone().requires_grad_()
    rope(leaf).sum().backward()
    assert leaf.grad is not None


# What transformers 5.24 computes in fp32, `ROPE_INIT_FUNCTIONS`, for 16 components and a base of 10000.
@pytest.mark.parametrize(
    ("scaling", "expected", "magnitude"),
    [
        (LinearScaling(4.0), [10000.0 ** (-j / 8) / 4 for j in range(8)], 1.0),
        (
            NTKScaling(7.0),  # "dynamic" with factor 2 at four times the length
            [1.0, 0.2394814, 0.05735132, 0.01373457, 0.003289174, 0.0007876959, 0.0001886385, 4.517539e-05],
            1.0,
        ),
        (
            YaRNScaling(8.0, 4096),
            [1.0, 0.3162278, 0.1, 0.02470529, 0.005625, 0.001087033, 0.000125, 3.952847e-05],
            1.2079441541679836,
        ),
        (
            YaRNScaling(8.0, 2048, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3, truncate=False),
            [1.0, 0.3162278, 0.1, 0.02577162, 0.003305222, 0.0003952847, 0.000125, 3.952847e-05],
            1.3,
        ),
        (
            Llama3Scaling(8.0, 512),
            [1.0, 0.3162278, 0.1, 0.01849668, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
            1.0,
        ),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "factor") else "",
)
def test_a_scaling_is_that_of_transformers(scaling, expected, magnitude):
    found, magnitudes = frequencies(RotaryEmbedding(16, scaling=scaling))
    assert found == pytest.approx(expected, rel=1e-6)
    assert magnitudes == pytest.approx([magnitude] * 8, rel=1e-12)


@pytest.mark.parametrize(
    "scaling", [LinearScaling(1.0), NTKScaling(1.0), YaRNScaling(1.0, 64), Llama3Scaling(1.0, 64)], ids=str
)
@pytest.mark.parametrize("dim", [2, 8])
def test_a_factor_of_one_changes_nothing(dim, scaling):
    x = torch.randn(1, 9, 1, dim, dtype=torch.float64)
    torch.testing.assert_close(RotaryEmbedding(dim, scaling=scaling)(x), RotaryEmbedding(dim)(x))


def test_ntk_slows_the_slowest_pair_by_the_factor_alone():
    plain, _ = frequencies(RotaryEmbedding(8))
    scaled, _ = frequencies(RotaryEmbedding(8, scaling=NTKScaling(5.0)))
    assert (scaled[0], scaled[-1]) == pytest.approx((plain[0], plain[-1] / 5.0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_is_equal_and_has_no_tensors(duplicate):
    rope, x = RotaryEmbedding(8, base=500.0, layout="interleaved", scaling=LinearScaling(2.0)), torch.randn(1, 4, 2, 8)
    expected = rope(x)
    size = len(pickle.dumps(rope))
    twin = duplicate(rope)
    assert twin == rope
    assert hash(twin) == hash(rope)
    assert torch.equal(twin(x), expected)
    assert size == len(pickle.dumps(RotaryEmbedding(8, base=500.0, layout="interleaved", scaling=LinearScaling(2.0))))


def test_a_description_cannot_be_changed():
    with pytest.raises(AttributeError):
        RotaryEmbedding(8).base = 2.0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dim": 3}, ValueError, "dim must be a positive even number of components; got 3"),
        ({"dim": 0}, ValueError, "dim must be a positive even number of components; got 0"),
        ({"dim": 4.0}, ValueError, "got 4.0"),
        ({"base": 1.0}, ValueError, "base must be greater than 1; got 1.0"),
        ({"layout": "pairs"}, ValueError, "layout must be 'half' or 'interleaved'; got 'pairs'"),
        ({"scaling": 2.0}, TypeError, "scaling must be None or one of LinearScaling, NTKScaling, YaRNScaling, Llama3S"),
        ({"scaling": LinearScaling(0.5)}, ValueError, r"a factor of at least 1; got LinearScaling\(factor=0.5\)"),
        ({"scaling": YaRNScaling(2.0, 0)}, ValueError, "numbers greater than 0; got YaRNScaling"),
        ({"scaling": YaRNScaling(2.0, 64, 1.0, 2.0)}, ValueError, "beta_slow < beta_fast; got YaRNScaling"),
        ({"scaling": Llama3Scaling(2.0, 64, 4.0, 4.0)}, ValueError, "low_freq_factor < high_freq_factor; got Llama3"),
    ],
    ids=str,
)
def test_a_mistake_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        fused_mha.RotaryEmbedding(**{"dim": 8} | arguments)


HEADS = torch.randn(2, 5, 3, 8)


@pytest.mark.parametrize(
    ("x", "positions", "error", "text"),
    [
        (HEADS.long(), None, TypeError, "x must be a tensor of a floating dtype; got torch.int64"),
        ([1.0], None, TypeError, "x must be a tensor of a floating dtype; got list"),
        (HEADS[..., :4], None, ValueError, r"x must have .* D of at least dim = 6; got \(2, 5, 3, 4\)"),
        (HEADS[0], None, ValueError, r"x must have shape \(N, L, H, D\) with .*; got \(5, 3, 8\)"),
        (HEADS, torch.arange(5.0), TypeError, "positions must be a tensor of an integer dtype; got torch.float32"),
        (HEADS, torch.ones(5, dtype=torch.bool), TypeError, "positions must be .* an integer dtype; got torch.bool"),
        (HEADS, [0, 1, 2, 3, 4], TypeError, "positions must be a tensor of an integer dtype; got list"),
        (
            HEADS,
            torch.arange(4),
            ValueError,
            r"positions must have shape \(L\) = \(5,\) or \(N, L\) = \(2, 5\); got \(4,\)",
        ),
        (HEADS, torch.zeros(3, 5).long(), ValueError, r"positions must have shape .*; got \(3, 5\)"),
        (HEADS, torch.arange(5, device="meta"), RuntimeError, "positions must be on the heads' device, cpu; got meta"),
    ],
)
def test_a_mistake_in_a_call_is_named(x, positions, error, text):
    with pytest.raises(error, match=text):
        RotaryEmbedding(6)(x, positions)


def test_no_token_has_no_position():
    assert RotaryEmbedding(6)(HEADS[:, :0], torch.arange(0)).shape == (2, 0, 3, 8)

"""Options of `attention` that change scores otherwise than a mask does: softcap, sinks and ALiBi."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_mha
from attention_oracle import assert_matches_oracle, can_serve, make_arguments
from fused_mha.core import dispatch
from native.call_space import weights_of_some

from search import examples

SERVE = [
    candidate.name
    for candidate in dispatch.BACKENDS
    if candidate.capability.score_options and "cpu" in (candidate.capability.devices or ("cpu",))
]
OPTIONS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"of_heads": ("sinks",)},
    "ALiBi": {"of_heads": ("alibi_slopes",)},
    "softcap and sinks": {"softcap": 0.7, "of_heads": ("sinks",)},
    "all": {"softcap": 2.0, "of_heads": ("sinks", "alibi_slopes")},
}
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right", "L": 3, "S": 7},
    "bottom right, more queries": {"causal_alignment": "bottom_right", "L": 7, "S": 3},
    "window": {"window": (2, 1), "L": 6, "S": 6},
    "masks": {"mask_dtype": torch.float32, "mask_shape": "NHLS", "padding_dtype": torch.float32},
    "bool masks": {"mask_dtype": torch.bool, "padding_dtype": torch.bool, "hidden": 0.7},
    "virtual keys": {"bias_kv": True, "add_zero_attn": True, "mask_dtype": torch.bool},
    "weights": {"need_weights": True, "return_lse": True, "padding_dtype": torch.bool, "hidden": 0.6},
    "weights per head": {"need_weights": True, "average_attn_weights": False},
    "weights of some heads": {"weights_of_heads": (3, 0), "return_lse": True},
    "one query": {"L": 1, "S": 40, "causal_alignment": "bottom_right"},
    "few keys": {"L": 40, "S": 2},
    "several tiles": {"L": 70, "S": 150, "D": 8, "D_v": 8, "return_lse": True},
    "one head": {"H": 1, "H_kv": 1},
}
each_back_end = pytest.mark.parametrize("backend", SERVE)


def of_scores(*scores, **others):
    """One query of one head, with a key of value 1 for each score."""
    key = torch.tensor(scores, dtype=torch.float64).view(1, -1, 1, 1)
    return {"query": torch.ones(1, 1, 1, 1, dtype=torch.float64), "key": key, "value": torch.ones_like(key)} | others


class TestByHand:
    @each_back_end
    def test_a_sink_takes_its_share_and_gives_no_value(self, backend):
        with fused_mha.backend(backend):
            result = fused_mha.attention(
                **of_scores(0.0, 0.0), sinks=torch.tensor([math.log(2.0)]), need_weights=True, return_lse=True
            )
        torch.testing.assert_close(result.weights.flatten().tolist(), [0.25, 0.25])
        assert result.output.item() == pytest.approx(0.5)
        assert result.lse.item() == pytest.approx(math.log(4.0))

    @each_back_end
    def test_a_sink_is_all_that_a_hidden_row_sees(self, backend):
        hidden = torch.ones(1, 2, dtype=torch.bool)
        with fused_mha.backend(backend):
            result = fused_mha.attention(
                **of_scores(0.0, 1.0, sinks=torch.tensor([3.0])),
                key_padding_mask=hidden,
                need_weights=True,
                return_lse=True,
            )
        assert result.output.item() == 0.0
        assert result.weights.abs().sum() == 0.0
        assert result.lse.item() == pytest.approx(3.0)

    @each_back_end
    def test_a_nan_in_a_value_reaches_no_row_that_sees_a_sink_alone(self, backend):
        arguments = of_scores(0.0, 1.0, sinks=torch.tensor([3.0]), attn_mask=torch.ones(1, 2, dtype=torch.bool))
        arguments["value"] = torch.full((1, 2, 1, 1), math.nan, dtype=torch.float64)
        with fused_mha.backend(backend):
            result = fused_mha.attention(**arguments, need_weights=True, return_lse=True)
        assert result.output.item() == 0.0
        assert result.weights.abs().sum() == 0.0
        assert result.lse.item() == 3.0

    @each_back_end
    @pytest.mark.parametrize("sink", [1e4, -1e4, -math.inf])
    def test_a_sink_far_from_the_scores(self, backend, sink):
        with fused_mha.backend(backend):
            result = fused_mha.attention(**of_scores(0.0, 1.0), sinks=torch.tensor([sink]), return_lse=True)
        assert result.output.item() == pytest.approx(0.0 if sink > 0 else 1.0)
        assert result.lse.item() == pytest.approx(max(sink, math.log(1 + math.e)))

    @each_back_end
    def test_scores_are_capped(self, backend):
        with fused_mha.backend(backend):
            result = fused_mha.attention(**of_scores(1.0, -1e6, 1e6), softcap=2.0, need_weights=True, return_lse=True)
        scores = torch.tensor([2.0 * math.tanh(0.5), -2.0, 2.0], dtype=torch.float64)
        torch.testing.assert_close(result.weights.flatten(), torch.softmax(scores, 0))
        assert result.lse.item() == pytest.approx(torch.logsumexp(scores, 0).item())

    @each_back_end
    def test_alibi_falls_with_the_distance_from_the_position(self, backend):
        zeros = torch.zeros(1, 2, 1, 1, dtype=torch.float64), *[torch.zeros(1, 4, 1, 1, dtype=torch.float64)] * 2
        for alignment, distances in (
            ("top_left", [[0, 1, 2, 3], [1, 0, 1, 2]]),
            ("bottom_right", [[2, 1, 0, 1], [3, 2, 1, 0]]),
        ):
            with fused_mha.backend(backend):
                weights = fused_mha.attention(
                    *zeros, alibi_slopes=torch.tensor([0.5]), causal_alignment=alignment, need_weights=True
                ).weights
            expected = torch.softmax(-0.5 * torch.tensor(distances, dtype=torch.float64), dim=-1)
            torch.testing.assert_close(weights[0], expected)


@pytest.mark.thorough(one_in=3)
@each_back_end
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_and_gradients_match_the_oracle(call, option, dtype, backend):
    assert_matches_oracle(make_arguments(dtype=dtype, **call | option), backend)


@each_back_end
@settings(max_examples=examples(60))
@given(data=st.data())
def test_any_call(backend, data):
    draw = data.draw
    H_kv = draw(st.integers(1, 3))
    H = H_kv * draw(st.integers(1, 3))
    heads = draw(st.none() | weights_of_some(H))
    arguments = make_arguments(
        N=draw(st.integers(1, 2)),
        L=draw(st.sampled_from([1, 2, 5, 17])),
        S=draw(st.sampled_from([1, 3, 8, 18, 33])),
        H=H,
        H_kv=H_kv,
        D=draw(st.integers(4, 9)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        mask_dtype=draw(st.sampled_from([None, torch.bool, torch.float32])),
        mask_shape=draw(st.sampled_from(["LS", "NHLS", "4D S"])),
        padding_dtype=draw(st.sampled_from([None, torch.bool, torch.float32])),
        bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        is_causal=draw(st.booleans()),
        causal_alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=draw(st.sampled_from([None, (3, None), (2, 2)])),
        softcap=draw(st.sampled_from([None, 0.5, 30.0])),
        of_heads=draw(st.sampled_from([(), ("sinks",), ("alibi_slopes",), ("sinks", "alibi_slopes")])),
        need_weights=heads is None and draw(st.booleans()),
        average_attn_weights=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        weights_of_heads=heads,
        seed=draw(st.integers(0, 1000)),
    )
    assert_matches_oracle(arguments, backend)


@pytest.mark.parametrize(
    ("error", "text", "given"),
    [
        (ValueError, "softcap must be None or a positive, finite number of .*; got 0", {"softcap": 0}),
        (
            ValueError,
            "softcap must be None or a positive, finite number of .*; got -1.0",
            {"softcap": -1.0},
        ),
        (
            ValueError,
            "softcap must be None or a positive, finite number of .*; got inf",
            {"softcap": math.inf},
        ),
        (
            ValueError,
            "softcap must be None or a positive, finite number of .*; got 'x'",
            {"softcap": "x"},
        ),
        (ValueError, "softcap must be None or a positive, finite number of .*; got True", {"softcap": True}),
        (ValueError, "softcap must be None or a positive, finite number of .*; got 1e-46", {"softcap": 1e-46}),
        (ValueError, "softcap must be None or a positive, finite number of .*; got 1e[+]39", {"softcap": 1e39}),
        (RuntimeError, r"sinks must have shape \(H,\) = \(4,\).*\(3,\)", {"sinks": torch.zeros(3)}),
        (RuntimeError, "sinks must have.*floating dtype.*int64", {"sinks": torch.zeros(4, dtype=torch.int64)}),
        (RuntimeError, r"alibi_slopes must have shape \(H,\).*\(4, 1\)", {"alibi_slopes": torch.zeros(4, 1)}),
        (TypeError, "alibi_slopes must be a Tensor, not list", {"alibi_slopes": [0.5] * 4}),
        (RuntimeError, "got sinks on meta", {"sinks": torch.zeros(4, device="meta")}),
    ],
)
def test_bad_options_are_refused_by_name(error, text, given):
    with pytest.raises(error, match=text):
        fused_mha.attention(**make_arguments(), **given)


def test_a_back_end_that_knows_no_option_says_which():
    arguments = make_arguments(softcap=1.0, of_heads=("sinks",))
    assert not can_serve("sdpa", arguments)
    with pytest.raises(RuntimeError, match="it knows no softcap and no sinks"), fused_mha.backend("sdpa"):
        fused_mha.attention(**arguments)


LEARNED = {"softcap": 1.5, "of_heads": ("sinks", "alibi_slopes")}


def double(**case):
    """Arguments in fp64, of which query, key, value, sinks and slopes learn."""
    arguments = make_arguments(dtype=torch.float64, **LEARNED, **case)
    for name in ("query", "key", "value", "sinks", "alibi_slopes"):
        arguments[name].requires_grad_()
    return arguments


def test_second_derivatives():
    arguments = double(N=1, L=2, S=3, D=2, D_v=2, is_causal=True, causal_alignment="bottom_right", return_lse=True)
    names = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]

    def call(*tensors):
        result = fused_mha.attention(**arguments | dict(zip(names, tensors, strict=True)))
        return result.output, result.lse

    assert torch.autograd.gradgradcheck(call, tuple(arguments[name] for name in names))


def test_autocast_and_transforms():
    arguments = make_arguments(**LEARNED, D=8)
    with torch.autocast("cpu", torch.bfloat16):
        result = fused_mha.attention(**arguments).output
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), fused_mha.attention(**arguments).output, atol=0.05, rtol=0.05)

    def loss(sinks):
        return fused_mha.attention(**arguments | {"sinks": sinks}).output.square().sum()

    sinks = arguments["sinks"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(sinks), sinks)
    torch.testing.assert_close(torch.func.grad(loss)(sinks.detach()), expected)

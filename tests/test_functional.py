"""`fused_mha.attention`: numbers one can check by hand, and every argument against a naive fp64 loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_mha
from attention_oracle import (
    BACKENDS,
    FILLS,
    SERVE_EVERYTHING,
    assert_added_numbers_hide,
    assert_matches_oracle,
    can_serve,
    is_visible,
    make_arguments,
    naive_attention,
    run_with_gradients,
)
from fused_mha.testing.tolerances import tolerance

from search import examples

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MASK_SHAPES = ["LS", "S", "4D LS", "4D S", "HS", "HLS", "NS", "NLS", "NHS", "NHLS"]
PADDINGS = [None, torch.bool, torch.float32]
LENGTHS = [(2, 5), (4, 4), (5, 2)]

each_back_end = pytest.mark.parametrize("backend", BACKENDS)
each_that_serves_everything = pytest.mark.parametrize("backend", SERVE_EVERYTHING)


def one_head(scores, values, dtype=torch.float64):
    """Arguments with the given scores (L, S), before masks, and values (S)."""
    scores, values = torch.tensor(scores, dtype=dtype), torch.tensor(values, dtype=dtype)
    L, S = scores.shape
    # query i is the i-th row of the scores, key j the j-th unit vector
    query, key = scores.reshape(1, L, 1, S), torch.eye(S, dtype=dtype).reshape(1, S, 1, S)
    return {"query": query, "key": key, "value": values.reshape(1, S, 1, 1), "scale": 1.0}


def assert_equal_up_to_rounding(result, expected):
    expected = torch.tensor(expected, dtype=result.dtype)
    magnitude = expected.masked_fill(expected.isinf(), 0.0).abs().max().item()
    torch.testing.assert_close(result.detach(), expected, rtol=0, atol=tolerance(result.dtype, 0.0, magnitude))


@each_that_serves_everything
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("hidden", [66, 70])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_numbers_that_are_added_hide(dtype, name, hidden, fill, backend):
    with fused_mha.backend(backend):
        assert_added_numbers_hide(fused_mha.attention, dtype, fill, hidden, name)


class TestByHand:
    @each_that_serves_everything
    def test_weights_are_the_softmax_of_the_scores(self, backend):
        arguments = one_head([[0.0, math.log(3.0)]], [0.0, 4.0])
        with fused_mha.backend(backend):
            result = fused_mha.attention(**arguments, need_weights=True, return_lse=True)
        assert_equal_up_to_rounding(result.weights, [[[0.25, 0.75]]])
        assert_equal_up_to_rounding(result.output, [[[[3.0]]]])
        assert_equal_up_to_rounding(result.lse, [[[math.log(4.0)]]])

    @each_back_end
    def test_default_scale_is_one_over_the_root_of_the_head_size(self, backend):
        query, key = torch.full((1, 1, 1, 4), 1.0), torch.zeros(1, 2, 1, 4)
        key[0, 1] = math.log(3.0) / 2.0  # q @ k / sqrt(4) = log 3
        with fused_mha.backend(backend):
            output = fused_mha.attention(query, key, torch.tensor([0.0, 4.0]).reshape(1, 2, 1, 1)).output
        assert_equal_up_to_rounding(output, [[[[3.0]]]])

    @pytest.mark.parametrize(
        ("alignment", "expected"), [("top_left", [1.0, 1.5]), ("bottom_right", [2.0, 2.5])], ids=str
    )
    @each_back_end
    def test_causal_rows_average_the_visible_values(self, backend, alignment, expected):
        arguments = one_head([[0.0] * 4] * 2, [1.0, 2.0, 3.0, 4.0])
        with fused_mha.backend(backend):
            output = fused_mha.attention(**arguments, is_causal=True, causal_alignment=alignment).output
        assert_equal_up_to_rounding(output.flatten(), expected)

    @each_back_end
    def test_window_counts_keys_on_either_side_of_the_query(self, backend):
        arguments = one_head([[0.0] * 4] * 4, [1.0, 2.0, 4.0, 8.0])
        with fused_mha.backend(backend):
            both, none = (fused_mha.attention(**arguments, window=w).output.flatten() for w in ((1, 0), (0, 0)))
        assert_equal_up_to_rounding(both, [1.0, 1.5, 3.0, 6.0])
        assert_equal_up_to_rounding(none, [1.0, 2.0, 4.0, 8.0])

    @each_back_end
    def test_true_in_a_mask_means_ignore(self, backend):
        arguments = one_head([[0.0] * 3], [1.0, 2.0, 4.0])
        with fused_mha.backend(backend):
            masked = fused_mha.attention(**arguments, attn_mask=torch.tensor([[True, False, False]])).output
            padded = fused_mha.attention(**arguments, key_padding_mask=torch.tensor([[False, False, True]])).output
        assert_equal_up_to_rounding(masked.flatten(), [3.0])
        assert_equal_up_to_rounding(padded.flatten(), [1.5])

    @each_back_end
    def test_float_masks_are_added_to_the_scores_and_to_one_another(self, backend):
        arguments = one_head([[0.0] * 2], [0.0, 10.0])
        mask = torch.tensor([[0.0, math.log(2.0)]], dtype=torch.float64)
        with fused_mha.backend(backend):
            output = fused_mha.attention(**arguments, attn_mask=mask, key_padding_mask=mask).output
        assert_equal_up_to_rounding(output.flatten(), [8.0])

    @each_that_serves_everything
    def test_virtual_keys_come_last_bias_before_zero(self, backend):
        arguments = one_head([[0.0]], [6.0])
        bias_k, bias_v = (torch.tensor([[x]], dtype=torch.float64) for x in (math.log(2.0), 3.0))
        arguments["query"] = torch.ones_like(arguments["query"])
        arguments["key"] = torch.zeros_like(arguments["key"])
        arguments |= {"bias_k": bias_k, "bias_v": bias_v, "add_zero_attn": True}
        with fused_mha.backend(backend):
            result = fused_mha.attention(**arguments, need_weights=True, return_lse=True)
        assert_equal_up_to_rounding(result.weights, [[[0.25, 0.5, 0.25]]])
        assert_equal_up_to_rounding(result.output.flatten(), [3.0])
        assert_equal_up_to_rounding(result.lse.flatten(), [math.log(4.0)])

    @each_that_serves_everything
    def test_averaged_weights_are_the_mean_over_the_heads(self, backend):
        query = torch.tensor([0.0, math.log(3.0)]).reshape(1, 1, 2, 1)
        key = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
        arguments = {"query": query, "key": key, "value": key, "scale": 1.0, "need_weights": True}
        with fused_mha.backend(backend):
            per_head = fused_mha.attention(**arguments, average_attn_weights=False).weights
            averaged = fused_mha.attention(**arguments).weights
        assert_equal_up_to_rounding(per_head, [[[[0.5, 0.5]], [[0.25, 0.75]]]])
        assert_equal_up_to_rounding(averaged, [[[0.375, 0.625]]])

    @each_back_end
    def test_grouped_queries_read_the_key_head_of_their_group(self, backend):
        value = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
        with fused_mha.backend(backend):
            output = fused_mha.attention(torch.randn(1, 1, 6, 3), torch.randn(1, 1, 2, 3), value).output
        assert_equal_up_to_rounding(output.flatten(), [1.0, 1.0, 1.0, 2.0, 2.0, 2.0])


@each_back_end
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1)], ids="H{0[0]}-H_kv{0[1]}".format)
def test_heads_and_value_size(backend, dtype, heads):
    H, H_kv = heads
    assert_matches_oracle(make_arguments(dtype=dtype, H=H, H_kv=H_kv, D=3, D_v=7), backend)


@each_back_end
@pytest.mark.parametrize(
    "window", [None, (0, 0), (1, None), (None, 1), (2, 1), (None, None), (10**30, 2**63 - 1)], ids=str
)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("L", "S"), LENGTHS)
def test_causality_and_windows(backend, L, S, is_causal, alignment, window):
    assert_matches_oracle(
        make_arguments(L=L, S=S, is_causal=is_causal, causal_alignment=alignment, window=window), backend
    )


@each_that_serves_everything
@pytest.mark.parametrize(("L", "S"), LENGTHS)
def test_bottom_right_alignment_ends_at_the_last_key(backend, L, S):
    arguments = make_arguments(L=L, S=S, is_causal=True, causal_alignment="bottom_right", need_weights=True)
    with fused_mha.backend(backend):
        weights = fused_mha.attention(**arguments).weights
    assert torch.equal(weights[0] > 0, torch.ones(L, S).tril(S - L) > 0)
    assert is_visible(L - 1, S - 1, L, S, is_causal=True, causal_alignment="bottom_right")


@each_back_end
@pytest.mark.parametrize("virtual", [{"bias_kv": True}, {"add_zero_attn": True}, {"bias_kv": True, "add_zero_attn": 1}])
@pytest.mark.parametrize(
    "hidden",
    [
        {},
        {"is_causal": True, "causal_alignment": "bottom_right", "L": 5, "S": 3},
        {"window": (0, 0), "L": 5, "S": 3},
        {"mask_dtype": torch.bool, "mask_shape": "NHLS"},
        {"padding_dtype": torch.bool, "hidden": 1.0},
        {"mask_dtype": torch.float32, "hidden": 1.0},
    ],
    ids=["all visible", "causal", "window", "mask", "all padding", "all masked"],
)
def test_virtual_keys_are_always_visible(backend, virtual, hidden):
    arguments = make_arguments(**virtual, **hidden)
    assert_matches_oracle(arguments, backend)
    width = arguments["key"].shape[1] + ("bias_kv" in virtual) + ("add_zero_attn" in virtual)
    with fused_mha.backend("reference" if backend == "sdpa" else backend):
        weights = fused_mha.attention(**arguments, need_weights=True, average_attn_weights=False).weights
    assert weights.shape[-1] == width
    assert bool((weights[..., arguments["key"].shape[1] :] > 0).all())


@each_back_end
@pytest.mark.parametrize("padding_dtype", PADDINGS, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("mask_shape", MASK_SHAPES)
def test_masks_of_every_broadcast_shape(backend, mask_shape, mask_dtype, padding_dtype):
    assert_matches_oracle(
        make_arguments(mask_shape=mask_shape, mask_dtype=mask_dtype, padding_dtype=padding_dtype), backend
    )


@each_back_end
@pytest.mark.parametrize("where", ["mask_dtype", "padding_dtype"])
@pytest.mark.parametrize("mask_dtype", DTYPES, ids="mask {}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_masks_of_any_floating_dtype(backend, dtype, mask_dtype, where):
    assert_matches_oracle(make_arguments(dtype=dtype, **{where: mask_dtype}), backend)


@each_back_end
@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.7, 3.0])
def test_scale(backend, scale):
    assert_matches_oracle(make_arguments(scale=scale, mask_dtype=torch.float32), backend)


@each_that_serves_everything
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per head"])
@pytest.mark.parametrize("mask_shape", [None, "LS", "HLS"])
def test_weights_and_log_sum_exp(backend, dtype, average, mask_shape):
    masks = {} if mask_shape is None else {"mask_dtype": torch.float32, "mask_shape": mask_shape, "hidden": 0.7}
    assert_matches_oracle(
        make_arguments(dtype=dtype, need_weights=True, average_attn_weights=average, return_lse=True, **masks),
        backend,
    )


@each_back_end
@pytest.mark.parametrize("empty", [{"N": 0}, {"L": 0}, {"S": 0}, {"N": 0, "L": 0, "S": 0}], ids=str)
@pytest.mark.parametrize("extra", [{}, {"mask_dtype": torch.bool, "padding_dtype": torch.float32}, {"bias_kv": True}])
@pytest.mark.parametrize("wanted", [{}, {"need_weights": True, "return_lse": True}], ids=["output", "everything"])
def test_empty_batches_and_sequences(backend, empty, extra, wanted):
    arguments = make_arguments(**empty, **extra, **wanted)
    if can_serve(backend, arguments):
        assert_matches_oracle(arguments, backend)
    else:
        with fused_mha.backend(backend), pytest.raises(RuntimeError, match=f"{backend}: cannot: .*"):
            fused_mha.attention(**arguments)


@pytest.mark.parametrize("masks", [{"mask_dtype": torch.bool}, {"mask_dtype": torch.float32}], ids=str)
@each_back_end
def test_fully_masked_rows_give_zeros_and_finite_gradients(backend, masks):
    arguments = make_arguments(**masks, hidden=0.2)
    empty_row = torch.tensor(True) if masks["mask_dtype"] == torch.bool else torch.tensor(-INF)
    arguments["attn_mask"][1] = empty_row
    assert_matches_oracle(arguments, backend)
    with fused_mha.backend(backend):
        results = run_with_gradients(fused_mha.attention, arguments)
    assert torch.equal(results["output"][:, 1], torch.zeros_like(results["output"][:, 1]))
    assert bool((results["output"][:, 0] != 0).all())
    assert torch.equal(results["grad of query"][:, 1], torch.zeros_like(results["grad of query"][:, 1]))
    assert all(bool(x.isfinite().all()) for x in results.values())


@each_that_serves_everything
def test_fully_masked_rows_give_zero_weights_and_an_infinite_log_sum_exp(backend):
    arguments = make_arguments(mask_dtype=torch.bool, hidden=0.0, need_weights=True, return_lse=True)
    arguments["attn_mask"][1] = True
    with fused_mha.backend(backend):
        results = run_with_gradients(fused_mha.attention, arguments)
    assert torch.equal(results["weights"][:, 1], torch.zeros_like(results["weights"][:, 1]))
    assert bool((results["lse"][:, :, 1] == -INF).all())
    assert bool(results["lse"][:, :, [0, 2]].isfinite().all())
    assert all(bool(results[f"grad of {name}"].isfinite().all()) for name in ("query", "key", "value"))


@each_back_end
@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("padding_dtype", [torch.bool, torch.float32], ids=str)
def test_a_hidden_key_is_never_read(backend, padding_dtype, poison):
    arguments = make_arguments(padding_dtype=padding_dtype, hidden=0.0)
    arguments["key_padding_mask"][0, 2:] = True if padding_dtype == torch.bool else -INF
    poisoned = dict(arguments, key=arguments["key"].clone(), value=arguments["value"].clone())
    poisoned["key"][0, 2:] = poisoned["value"][0, 2:] = poison
    with fused_mha.backend(backend):
        clean, dirty = (run_with_gradients(fused_mha.attention, a) for a in (arguments, poisoned))
    for name, expected in clean.items():
        assert torch.equal(dirty[name], expected), name


@each_back_end
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("strides", ["transposed", "strided", "expanded"])
def test_any_strides(backend, name, strides):
    arguments = make_arguments(mask_dtype=torch.float32, mask_shape="NHLS", padding_dtype=torch.float32)
    x = arguments[name]
    if strides == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif strides == "strided":
        x = torch.stack([x, torch.full_like(x, NAN)], dim=-1)[..., 0]
    else:
        x = x[:1].expand_as(x)
    assert not x.is_contiguous()
    as_given, contiguous = arguments | {name: x}, arguments | {name: x.contiguous()}
    assert_matches_oracle(as_given, backend)
    with fused_mha.backend(backend):
        assert torch.equal(fused_mha.attention(**as_given).output, fused_mha.attention(**contiguous).output)


@each_that_serves_everything
def test_arguments_are_not_changed(backend):
    arguments = make_arguments(mask_dtype=torch.float32, padding_dtype=torch.bool, bias_kv=True, need_weights=True)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with torch.no_grad(), fused_mha.backend(backend):
        fused_mha.attention(**arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_the_oracle_itself_gives_numbers_known_by_hand():
    arguments = one_head([[0.0, math.log(3.0), 5.0]], [0.0, 4.0, NAN]) | {
        "key_padding_mask": torch.tensor([[False, False, True]]),
        "need_weights": True,
        "return_lse": True,
    }
    result = naive_attention(**arguments)
    assert_equal_up_to_rounding(result.output.flatten(), [3.0])
    assert_equal_up_to_rounding(result.weights.flatten(), [0.25, 0.75, 0.0])
    assert_equal_up_to_rounding(result.lse.flatten(), [math.log(4.0)])


@st.composite
def attention_arguments(draw):
    def pick(*options):
        return draw(st.sampled_from(options))

    H_kv = pick(1, 2)
    return make_arguments(
        N=pick(0, 1, 2),
        L=draw(st.integers(0, 4)),
        S=draw(st.integers(0, 5)),
        H_kv=H_kv,
        H=H_kv * pick(1, 2),
        D=draw(st.integers(2, 5)),
        D_v=draw(st.integers(1, 4)),
        dtype=pick(*DTYPES),
        mask_dtype=pick(None, torch.bool, *DTYPES),
        mask_shape=pick(*MASK_SHAPES),
        padding_dtype=pick(None, torch.bool, *DTYPES),
        bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        hidden=pick(0.1, 0.4, 0.8),
        is_causal=draw(st.booleans()),
        causal_alignment=pick("top_left", "bottom_right"),
        window=pick(None, (1, None), (None, 1), (0, 0), (1, 2)),
        scale=pick(None, 0.3, 2.0),
        need_weights=draw(st.booleans()),
        average_attn_weights=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=examples(400))
@given(arguments=attention_arguments())
def test_any_call_matches_the_oracle_on_every_back_end_that_can_serve(arguments):
    able = [backend for backend in BACKENDS if can_serve(backend, arguments)]
    assert able
    for backend in able:
        assert_matches_oracle(arguments, backend)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_default_device_other_than_the_tensors_changes_nothing(requires_grad):
    arguments = make_arguments(dropout_p=0.5, need_weights=True)
    query = arguments.pop("query").requires_grad_(requires_grad)
    torch.manual_seed(0)
    expected = fused_mha.attention(query, **arguments)
    torch.manual_seed(0)
    with torch.device("meta"):
        result = fused_mha.attention(query, **arguments)
        if requires_grad:
            result.output.backward(torch.ones_like(result.output))
            assert query.grad.isfinite().all()
    assert torch.equal(result.output, expected.output)
    assert torch.equal(result.weights, expected.weights)

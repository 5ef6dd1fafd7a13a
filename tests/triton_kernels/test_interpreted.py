"""The Triton kernels under the interpreter against the fp64 oracle: every result and every gradient.

fp32 and fp16 alone: the interpreter's bfloat16 arithmetic is wrong.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from attention_oracle import FILLS, assert_added_numbers_hide, checked, make_arguments
from closeness import assert_close_to_oracle
from fused_mha.backends.arguments import arguments_of
from fused_mha.core import reference
from native.call_space import calls
from native.dense_oracle import drawn_seed
from triton_kernels.kinds import CASES, EVERYTHING, SINKS, SLOPES, matches_oracle

from search import examples

pytest.importorskip("triton")
import triton
import triton.language as tl

from fused_mha.backends.triton.scores import tanh

DTYPES = (torch.float32, torch.float16)


SEVERAL_TILES = [(name, dtype) for i, name in enumerate(CASES) for dtype in DTYPES[: 1 if i % 3 else 2]]


@pytest.mark.parametrize(("name", "dtype"), SEVERAL_TILES, ids=str)
def test_several_tiles(attention, name, dtype):
    matches_oracle(attention, make_arguments(N=2, L=70, S=90, H=2, H_kv=1, D=24, D_v=16, dtype=dtype, **CASES[name]))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("hidden", [66, 70])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_large_numbers_that_are_added_hide(attention, name, hidden, fill):
    """A first tile of keys may be hidden by them alone."""
    assert_added_numbers_hide(attention, torch.float16, fill, hidden, name)


@pytest.mark.parametrize("D", [1, 8, 40, 64, 80, 128, 200, 256])
def test_head_sizes(attention, integers_are_checked, D):
    matches_oracle(attention, make_arguments(N=1, L=5, S=37, H=2, H_kv=2, D=D, D_v=D, is_causal=True))


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 130), (130, 1), (64, 64), (65, 31), (3, 127), (16, 256)])
def test_lengths(attention, integers_are_checked, L, S):
    arguments = make_arguments(N=1, L=L, S=S, H=1, H_kv=1, D=16, bias_kv=True, is_causal=True, **EVERYTHING)
    matches_oracle(attention, arguments)


@settings(
    max_examples=examples(15),
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls(dtypes=DTYPES, dropout=(0.0, 0.0, 0.3), smallest=1))
def test_any_call(attention, call):
    matches_oracle(attention, call.arguments, call.seed)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_weights_after_torchs_flash_kernel(attention, monkeypatch, is_causal, averaged):
    calls = []

    def flash(query, key, value, dropout_p, is_causal, return_debug_mask, scale):
        calls.append((query.shape, scale))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)

    monkeypatch.setattr("fused_mha.backends.triton.launch._flash_attention", flash)
    monkeypatch.setattr("fused_mha.backends.triton.launch._has_flash", lambda _: True)
    monkeypatch.setattr("fused_mha.backends.triton.launch.LEAST_SCORES_OF_FLASH", 0)
    wanted = {"need_weights": True, "average_attn_weights": averaged, "is_causal": is_causal, "scale": 0.3}
    matches_oracle(attention, make_arguments(N=2, L=70, S=70, H=2, H_kv=2, D=24, D_v=24, dtype=torch.float16, **wanted))
    assert calls == [((2, 2, 70, 24), 0.3)]


@pytest.mark.parametrize(
    "other",
    [
        {"need_weights": False},
        {"dtype": torch.float32},
        {"padding_dtype": torch.bool},
        {"mask_dtype": torch.bool},
        {"window": (3, 3)},
        {"bias_kv": True},
        {"add_zero_attn": True},
        {"dropout_p": 0.5},
        {"scale": -1.0},
        {"H_kv": 1},
        {"D": 20, "D_v": 20},
        {"D_v": 16},
        {"is_causal": True, "S": 8},
        {"L": 1},
        {"softcap": 3.0},
        {"of_heads": SINKS},
        {"of_heads": SLOPES},
        {"least": 1 << 6},
    ],
    ids=", ".join,
)
def test_torchs_flash_kernel_is_not_called_for_what_it_cannot_do(attention, monkeypatch, other):
    def flash(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr("fused_mha.backends.triton.launch._flash_attention", flash)
    monkeypatch.setattr("fused_mha.backends.triton.launch._has_flash", lambda _: True)
    monkeypatch.setattr("fused_mha.backends.triton.launch.LEAST_SCORES_OF_FLASH", other.get("least", 0))
    sizes = {"N": 1, "L": 5, "S": 5, "H": 2, "H_kv": 2, "D": 24, "D_v": 24, "dtype": torch.float16}
    changed = {name: value for name, value in other.items() if name != "least"}
    results = attention(**make_arguments(**sizes | {"need_weights": True} | changed))
    assert results.output.isfinite().all()


def test_large_additive_padding_beside_rows_that_fill_no_tile(attention):
    arguments = make_arguments(N=1, L=5, S=40, H=1, H_kv=1, D=16, padding_dtype=torch.float32, hidden=0.0)
    arguments["key_padding_mask"] = torch.zeros(1, 40).index_fill(1, torch.arange(0, 40, 3), 100.0)
    matches_oracle(attention, arguments)


def test_slopes_that_favour_far_keys_beside_rows_that_fill_no_tile(attention):
    arguments = make_arguments(N=1, L=5, S=90, H=1, H_kv=1, D=16, alibi_slopes=torch.tensor([-5.0]))
    matches_oracle(attention, arguments)


@triton.jit
def _tanh_of(x, result, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(result + at, tanh(tl.load(x + at)))


def test_tanh_is_right_for_small_and_large_numbers_too():
    sizes = torch.cat([torch.logspace(-38, 5, 1 << 14), torch.linspace(0, 12, 1 << 14)])
    x = torch.cat([sizes, -sizes])
    found = torch.empty_like(x)
    _tanh_of[(len(x) >> 14,)](x, found, 1 << 14)
    exact = x.double().tanh()
    assert ((found.double() - exact).abs() <= 6 * 2.0**-24 * exact.abs()).all()


def test_tanh_of_what_is_not_finite():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    found = torch.empty_like(x)
    _tanh_of[(1,)](x, found, 4)
    assert found.tolist()[:2] == [1.0, -1.0]
    assert found[2].isnan()
    assert found[3] == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sink", [1e4, -1e4, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_sink_far_from_the_scores(attention, sink, hidden, dtype):
    arguments = make_arguments(N=1, L=5, S=40, H=1, H_kv=1, D=16, dtype=dtype)
    without = attention(**arguments, return_lse=True)
    arguments |= {"sinks": torch.tensor([sink]), "return_lse": True, "need_weights": True}
    found = attention(**arguments, key_padding_mask=torch.full((1, 40), hidden))
    if hidden or sink > 0:
        assert not found.output.any()
        assert not found.weights.any()
        assert (found.lse == sink).all()
    else:
        torch.testing.assert_close(found.output, without.output)
        torch.testing.assert_close(found.lse, without.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_in_a_value_reaches_no_row_that_sees_a_sink_alone(attention, dtype):
    arguments = make_arguments(N=1, L=5, S=40, H=1, H_kv=1, D=16, dtype=dtype, of_heads=SINKS)
    arguments["value"] = torch.full_like(arguments["value"], torch.nan)
    hidden = torch.zeros(5, 40, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    result = attention(**arguments, attn_mask=hidden, return_lse=True)
    assert not result.output[:, 2].any()
    assert result.lse[0, 0, 2] == arguments["sinks"][0]


@pytest.mark.parametrize("layout", ["strided", "unaligned", "expanded", "fp64", "fp16"])
def test_sinks_and_slopes_in_any_memory(attention, layout):
    arguments = make_arguments(N=2, L=5, S=40, H=4, H_kv=2, D=16, of_heads=SINKS + SLOPES)

    def lay_out(x):
        return {
            "strided": torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0],
            "unaligned": torch.cat([x[:1], x])[1:],
            "expanded": x[:1].expand(4),
            "fp64": x.double(),
            "fp16": x.half(),
        }[layout]

    matches_oracle(attention, arguments | {name: lay_out(arguments[name]) for name in SINKS + SLOPES})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "of_heads": SINKS + SLOPES}], ids=["plain", "options"])
@pytest.mark.parametrize("of", ["output", "weights", "lse"])
def test_nan_that_comes_back_to_a_hidden_row_reaches_no_other(attention, of, options, dtype):
    arguments = make_arguments(N=1, L=5, S=40, H=1, H_kv=1, D=16, dtype=dtype, **options)
    hidden = torch.zeros(5, 40, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    results = attention(**arguments, attn_mask=hidden, need_weights=True, return_lse=True)
    loss = {
        "output": (results.output / results.output.norm(dim=-1, keepdim=True)).nan_to_num().square().sum(),  # 0 / 0
        "weights": (results.weights * results.weights.log()).nan_to_num().sum(),  # the entropy, 0 * log(0)
        "lse": torch.logaddexp(results.lse, results.lse).exp().sum(),  # of two blocks of keys
    }[of]
    loss = loss + results.output.sum()
    if of != "lse" or not options:  # a sink is finite
        assert torch.autograd.grad(loss, getattr(results, of), retain_graph=True)[0].isnan().any()
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_calls_for_parts_of_the_keys_give_the_parts_of_the_gradients(dtype):
    launch = pytest.importorskip("fused_mha.backends.triton.launch")
    tensors = {name: torch.randn(1, 40, 2, 16).to(dtype) for name in ("query", "key", "value")}
    cotangent = torch.randn(1, 40, 2, 16).to(dtype)
    inputs = arguments_of(checked(**tensors))
    output, _, lse, stats = launch.attention(*inputs)
    found = []
    for keys in (slice(0, 16), slice(16, 40)):
        part = inputs._replace(key=inputs.key[:, keys], value=inputs.value[:, keys])
        given = (cotangent, None, torch.zeros_like(lse), output, stats, False, False)
        found.append(launch.attention_backward(*given, *part)[:3])
    of_query, *of_keys = zip(*found, strict=True)
    ours = {"query": sum(of_query), "key": torch.cat(of_keys[0], 1), "value": torch.cat(of_keys[1], 1)}

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors.values()]
        result = reference.attention(*leaves, scale=0.25)[0]
        return dict(zip(tensors, torch.autograd.grad(result, leaves, cotangent.to(dtype)), strict=True))

    assert_close_to_oracle(ours, gradients(dtype), lambda: gradients(torch.float64), terms=40, dtype=dtype)


def test_a_part_of_a_longer_call_drops_its_part_of_the_mask(attention):
    keep = torch.ops.fused_mha.dropout_mask(torch.tensor((11, -12)), (2, 5, 52, 100), 0.4)[:, 3:, 40:, 64:]
    arguments = make_arguments(N=2, L=12, S=36, H=2, H_kv=2, D=16, scale=0.0, dropout_p=0.4)
    arguments |= {"need_weights": True, "average_attn_weights": False}
    with drawn_seed(11, -12, 40, 64, 3, 5):
        assert torch.equal(attention(**arguments).weights != 0, keep)

"""Keys that key_padding_mask hides are never read; rows that are masked everywhere give zeros and finite gradients."""

import pytest
import torch

from attention_oracle import make_arguments, run_with_gradients
from native.call_space import DTYPES
from native.dense_oracle import drawn_seed, native_attention

INF, NAN = float("inf"), float("nan")
PER_HEAD = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
WANTED = {"output": {}, "averaged": {"need_weights": True}, "everything": PER_HEAD}
HIDDEN = {
    "odd keys": lambda S: torch.arange(S) % 2 == 1,
    "second half": lambda S: torch.arange(S) >= S // 2,
    "first half": lambda S: torch.arange(S) < S // 2,
    "all keys": lambda S: torch.ones(S, dtype=torch.bool),
}
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window and dropout": {"window": (9, 4), "dropout_p": 0.3},
    "bool mask": {"mask_dtype": torch.bool, "mask_shape": "NHLS"},
    "float mask": {"mask_dtype": torch.float32},
    "virtual keys": {"bias_kv": True, "add_zero_attn": True},
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_result = pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [{}, PER_HEAD], ids=["output", "everything"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_poison_in_hidden_keys_changes_no_bit_of_results_and_gradients(isa, hidden, call, wanted, dtype):
    S = 70
    arguments = make_arguments(L=17, S=S, D=9, D_v=6, dtype=dtype, **call, **wanted)
    mask = torch.zeros(2, S, dtype=torch.bool)
    mask[1] = hidden(S)
    arguments["key_padding_mask"] = mask
    if "bias_kv" in call or "window" in call:
        arguments["key_padding_mask"] = torch.randn(2, S).masked_fill(mask, -INF)
    with drawn_seed(1, 2):
        clean = run_with_gradients(native_attention, arguments)
        for poison in (NAN, INF):
            dirty = dict(arguments)
            for name in ("key", "value"):
                dirty[name] = arguments[name].masked_fill(mask[:, :, None, None], poison)
            results = run_with_gradients(native_attention, dirty)
            for name, expected in clean.items():
                assert torch.equal(results[name], expected), name
    for name in ("grad of key", "grad of value"):
        assert not clean[name][mask].any()
    assert all(bool(x.isfinite().all()) for name, x in clean.items() if name != "lse")


@pytest.mark.parametrize("padding_dtype", DTYPES, ids=str)
def test_minus_infinity_of_every_floating_dtype_hides_keys_from_being_read(base_isa, padding_dtype):
    arguments = make_arguments(L=5, S=40, padding_dtype=padding_dtype, hidden=0.5, **PER_HEAD)
    hidden = arguments["key_padding_mask"] == -INF
    clean = run_with_gradients(native_attention, arguments)
    for name in ("key", "value"):
        arguments[name] = arguments[name].masked_fill(hidden[:, :, None, None], NAN)
    for name, expected in clean.items():
        assert torch.equal(run_with_gradients(native_attention, arguments)[name], expected), name


@each_dtype
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_poison_in_hidden_keys_reaches_no_averaged_weight(isa, poison, dtype):
    arguments = make_arguments(L=17, S=70, dtype=dtype, padding_dtype=torch.bool, hidden=0.5, need_weights=True)
    clean = run_with_gradients(native_attention, arguments)
    for name in ("key", "value"):
        arguments[name] = arguments[name].masked_fill(arguments["key_padding_mask"][:, :, None, None], poison)
    dirty = run_with_gradients(native_attention, arguments)
    for name, expected in clean.items():
        assert torch.equal(dirty[name], expected), name


def rows_masked_everywhere(kind, L, S, mask_dtype):
    """Arguments that hide every real key from rows 1 and L - 1, and those rows, or from every row."""
    hides = torch.zeros(L, S, dtype=torch.bool)
    hides[[1, L - 1]] = True
    padding = torch.zeros(2, S, dtype=torch.bool)
    rows = torch.zeros(2, L, dtype=torch.bool)
    rows[:, [1, L - 1]] = True

    def as_mask(mask):
        return mask if mask_dtype == torch.bool else torch.zeros(mask.shape, dtype=mask_dtype).masked_fill(mask, -INF)

    if kind == "attn_mask":
        return {"attn_mask": as_mask(hides)}, rows
    if kind == "padding":
        padding[1] = True
        rows[:] = False
        rows[1] = True
        return {"key_padding_mask": as_mask(padding)}, rows
    if kind == "mask and padding":
        hides[[1, L - 1], S // 2 :] = False
        padding[:, S // 2 :] = True
        return {"attn_mask": as_mask(hides), "key_padding_mask": as_mask(padding)}, rows
    rows[:] = torch.arange(L) < L - S
    return {"is_causal": True, "causal_alignment": "bottom_right"}, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_result
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["attn_mask", "padding", "mask and padding", "causal"])
def test_rows_masked_everywhere_give_zeros_and_finite_gradients(isa, kind, mask_dtype, wanted, dtype):
    masks, rows = rows_masked_everywhere(kind, 45, 33, mask_dtype)
    arguments = make_arguments(L=45, S=33, D=9, D_v=6, dtype=dtype, dropout_p=0.2, **wanted) | masks
    results = run_with_gradients(native_attention, arguments)
    assert not results["output"][rows].any()
    assert bool(results["output"][~rows].any())
    assert not results["grad of query"][rows].any()
    if "weights" in results:
        weights = results["weights"] if results["weights"].dim() == 3 else results["weights"].transpose(1, 2)
        assert not weights[rows].any()
    if "lse" in results:
        lse = results["lse"].transpose(1, 2)
        assert bool((lse[rows] == -INF).all())
        assert bool(lse[~rows].isfinite().all())
    assert all(bool(x.isfinite().all()) for name, x in results.items() if name != "lse")
    for name in ("grad of attn_mask", "grad of key_padding_mask"):
        if name in results:
            assert not results[name][arguments[name.removeprefix("grad of ")] == -INF].any()


@each_dtype
def test_no_real_key_at_all_leaves_the_virtual_ones(isa, dtype):
    arguments = make_arguments(S=0, dtype=dtype, bias_kv=True)
    output = native_attention(**arguments).output
    expected = arguments["bias_v"].repeat_interleave(2, dim=0).expand(2, 3, 4, 5)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("S", [5, 300])
def test_hidden_rows_of_two_blocks_merge_with_finite_gradients(base_isa, S):
    """As ring attention merges: outputs weighted by their share of the sum of exponentials."""
    arguments = make_arguments(L=17, S=2 * S, H_kv=4, mask_dtype=torch.bool, return_lse=True, hidden=0.2)
    arguments["attn_mask"][4] = True
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]

    def block(first):
        keys = slice(first, first + S)
        parts = {name: arguments[name][:, keys] for name in ("key", "value")}
        return native_attention(**arguments | parts | {"attn_mask": arguments["attn_mask"][:, keys]})

    blocks = [block(0), block(S)]
    lse = torch.stack([result.lse for result in blocks])
    most = lse.detach().amax(0).clamp(min=-1e30)
    shares = torch.exp(lse - most)
    merged = sum(
        (share / shares.sum(0).clamp(min=1e-30)).transpose(1, 2)[..., None] * result.output
        for share, result in zip(shares, blocks, strict=True)
    )
    gradients = torch.autograd.grad(merged.square().sum(), leaves)
    whole = native_attention(**arguments)
    expected = torch.autograd.grad(whole.output.square().sum(), leaves)
    for x, y in zip((merged, *gradients), (whole.output, *expected), strict=True):
        assert bool(x.isfinite().all())
        assert (x - y).abs().max().item() <= 64 * torch.finfo(torch.float32).eps * y.abs().max().item()


@each_dtype
@pytest.mark.parametrize("S", [5, 70])
def test_a_nan_gradient_of_a_hidden_rows_lse_reaches_nothing(isa, S, dtype):
    """`logaddexp` of two lse gives it where both are -inf, as the constant -inf depends on nothing."""
    arguments = make_arguments(L=17, S=S, dtype=dtype, mask_dtype=torch.bool, hidden=0.2, return_lse=True)
    arguments["attn_mask"][4] = True
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    lse = native_attention(**arguments).lse
    cotangent = torch.randn_like(lse)
    clean = torch.autograd.grad(lse, leaves, cotangent, retain_graph=True, allow_unused=True)
    cotangent[:, :, 4] = NAN
    dirty = torch.autograd.grad(lse, leaves, cotangent, allow_unused=True)
    for x, y in zip(dirty[:2], clean[:2], strict=True):
        assert torch.equal(x, y)
    assert dirty[2] is clean[2] is None  # the log-sum-exp is no function of the values


@each_dtype
@pytest.mark.parametrize(("L", "S"), [(17, 5), (17, 70), (1, 5), (1, 70)])
def test_a_row_that_sees_a_sink_alone_is_that_sink_whatever_the_values_are(isa, L, S, dtype):
    row = min(4, L - 1)
    arguments = make_arguments(L=L, S=S, dtype=dtype, of_heads=("sinks",), weights_of_heads=(2, 0), return_lse=True)
    arguments["attn_mask"] = torch.zeros(L, S, dtype=torch.bool).index_fill(0, torch.tensor([row]), True)
    sinks = arguments["sinks"].requires_grad_()
    dirty = native_attention(**arguments | {"value": torch.full_like(arguments["value"], NAN)})
    assert not dirty.output[:, row].any()
    assert not dirty.weights[:, :, row].any()
    assert torch.equal(dirty.lse[:, :, row], sinks.detach().to(dirty.lse.dtype).expand(2, 4))
    clean = native_attention(**arguments)
    cotangents = [torch.zeros_like(clean.output), torch.zeros_like(clean.weights), torch.zeros_like(clean.lse)]
    for cotangent, of_row in zip(cotangents, (3.0, NAN, 0.5), strict=True):
        cotangent.select(1 if cotangent is cotangents[0] else 2, row).fill_(of_row)
    assert torch.equal(torch.autograd.grad(clean, sinks, cotangents)[0], torch.full_like(sinks, 2 * 0.5))

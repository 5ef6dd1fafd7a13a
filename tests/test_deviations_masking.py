"""Deviations 2 and 6 of docs/differences.md: rows that are masked everywhere, and keys that are never read."""

import pytest
import torch
from torch import Tensor, nn

import fused_mha
from calls import BACK_ENDS, CALLS, INF, NAN, WEIGHTS, WITH_WEIGHTS, forced, random_module
from fused_mha.testing.strategies import DTYPES

# 2. A row that is masked everywhere


# The mask's shape and the entries that hide query 1 of every sequence, or of sequence 1.
HIDE_ROW = {
    "2-D": ((4, 6), (1,)),
    "3-D": ((6, 4, 6), (slice(2, 4), 1)),  # both heads of sequence 1
    "4-D": ((3, 1, 4, 6), (1, 0, 1)),
}


@WEIGHTS
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("shape", HIDE_ROW)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_row_hidden_by_attn_mask_gives_out_proj_bias(shape, as_float, need_weights, average, back_end):
    module, query, key = (
        random_module(),
        torch.randn(3, 4, 8, requires_grad=True),
        torch.randn(3, 6, 8, requires_grad=True),
    )
    size, row = HIDE_ROW[shape]
    mask = torch.rand(size) < 0.4
    mask[..., 0] = False
    visible = _as_float(mask) if as_float else mask.clone()
    mask[row] = True
    hidden = _as_float(mask) if as_float else mask
    arguments = {"need_weights": need_weights, "average_attn_weights": average}
    with forced(back_end, need_weights):
        output, weights = module(query, key, key, attn_mask=hidden, **arguments)
        expected, expected_weights = module(query, key, key, attn_mask=visible, **arguments)
    rows = torch.zeros(3, 4, dtype=torch.bool)
    rows[(slice(None), 1) if shape == "2-D" else (1, 1)] = True
    _assert_hidden_rows(module, output, weights, rows)
    assert torch.equal(output[~rows], expected[~rows])  # other rows are untouched
    if need_weights:
        weights, expected_weights = (x if average else x.transpose(1, 2) for x in (weights, expected_weights))
        assert torch.equal(weights[~rows], expected_weights[~rows])
    _assert_finite_gradients(module, output, weights, query, key)


def _as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -INF)


def _assert_hidden_rows(module: nn.Module, output: Tensor, weights: Tensor | None, rows: Tensor) -> None:
    bias = module.out_proj.bias
    assert torch.equal(output[rows], bias.expand_as(output[rows]))
    if weights is not None:
        of_rows = weights[rows] if weights.dim() == 3 else weights.transpose(1, 2)[rows]
        assert torch.equal(of_rows, torch.zeros_like(of_rows))


def _assert_finite_gradients(module: nn.Module, output: Tensor, weights: Tensor | None, *leaves: Tensor) -> None:
    loss = output.square().sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    for gradient in torch.autograd.grad(loss, [*leaves, *module.parameters()]):
        assert gradient.isfinite().all()


@WEIGHTS
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_sequence_hidden_by_key_padding_mask_gives_out_proj_bias(as_float, need_weights, average, back_end):
    module, query, key = (
        random_module(),
        torch.randn(3, 4, 8, requires_grad=True),
        torch.randn(3, 6, 8, requires_grad=True),
    )
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1] = True
    arguments = {"need_weights": need_weights, "average_attn_weights": average}
    with forced(back_end, need_weights):
        mask = _as_float(padding) if as_float else padding
        output, weights = module(query, key, key, key_padding_mask=mask, **arguments)
        expected, _ = module(query, key, key, **arguments)
    rows = padding[:, :1].expand(3, 4)
    _assert_hidden_rows(module, output, weights, rows)
    torch.testing.assert_close(output[~rows], expected[~rows])
    gradient, _ = torch.autograd.grad(output.sum(), [query, key], retain_graph=True)
    assert torch.equal(gradient[1], torch.zeros(4, 8))
    _assert_finite_gradients(module, output, weights, query, key)


@WEIGHTS
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_masks_that_hide_a_row_only_together_give_out_proj_bias(need_weights, average, back_end):
    module, query, key = (
        random_module(),
        torch.randn(3, 4, 8, requires_grad=True),
        torch.randn(3, 6, 8, requires_grad=True),
    )
    attn_mask = torch.zeros(4, 6)
    attn_mask[2, :3] = -INF
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 3:] = True
    padding[2, 0] = True  # with causality, the first row of sequence 2 too
    with forced(back_end, need_weights):
        output, weights = module(
            query,
            key,
            key,
            padding,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average,
            is_causal=True,
        )
    rows = torch.zeros(3, 4, dtype=torch.bool)
    rows[:, 2] = True  # keys 0 to 2 are hidden by attn_mask, later ones by causality
    rows[2, 0] = True
    _assert_hidden_rows(module, output, weights, rows)
    assert not (output[~rows] == module.out_proj.bias).all(-1).any()
    _assert_finite_gradients(module, output, weights, query, key)


@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
def test_row_hidden_for_one_head_alone_keeps_the_other_heads(back_end):
    module = random_module()
    x = torch.randn(1, 4, 8)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1] = True
    with fused_mha.backend(back_end):
        _, weights = module(x, x, x, attn_mask=mask, average_attn_weights=False)
        _, expected = module(x, x, x, average_attn_weights=False)
        _, averaged = module(x, x, x, attn_mask=mask)
    assert torch.equal(weights[0, 0, 1], torch.zeros(4))
    assert torch.equal(weights[0, 1], expected[0, 1])
    torch.testing.assert_close(averaged[0, 1], expected[0, 1, 1] / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_everything_hidden_is_finite_in_every_dtype_and_under_autocast(dtype, back_end):
    module = random_module(dtype=dtype)
    x = torch.randn(3, 4, 8, dtype=dtype)
    hidden = torch.ones(3, 4, dtype=torch.bool)
    with fused_mha.backend(back_end):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output, _ = module(x, x, x, hidden, need_weights=False)
            assert torch.equal(output, module.out_proj.bias.to(output.dtype).expand(3, 4, 8))


@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
def test_virtual_keys_are_all_that_a_hidden_row_sees(back_end):
    module = random_module(add_bias_kv=True)
    x = torch.randn(3, 4, 8)
    with fused_mha.backend(back_end):
        output, weights = module(x, x, x, torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(weights, torch.eye(5)[-1].expand(3, 4, 5))
    torch.testing.assert_close(output, module.out_proj(module.bias_v).expand(3, 4, 8))


# 6. A hidden key is never read


def _poisoned(x: Tensor, padding: Tensor, poison: float) -> Tensor:
    return x.detach().clone().masked_fill_(padding[..., None], poison).requires_grad_()


def _run(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **arguments) -> list[Tensor]:
    """Outputs and every gradient."""
    leaves = [query.detach().requires_grad_(), key, *([] if value is key else [value])]
    results = [x for x in module(leaves[0], key, value, key_padding_mask=mask, **arguments) if x is not None]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in results), [*leaves, *module.parameters()])
    return [*results, *gradients]


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize("sharing", ["key is value", "separate", "kdim and vdim"])
@pytest.mark.parametrize(("back_end", "need_weights"), CALLS)
def test_nan_in_a_hidden_key_reaches_no_output_and_no_gradient(
    poison, as_float, layout, sharing, back_end, need_weights
):
    kdim, vdim = (5, 7) if sharing == "kdim and vdim" else (8, 8)
    module = random_module(batch_first=layout == "batch first", kdim=kdim, vdim=vdim, add_bias_kv=True)
    padding = torch.rand(3, 6) < 0.5
    padding[:, 0], padding[:, 1] = False, True
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 6, kdim), torch.randn(3, 6, vdim)
    runs = []
    for hidden_value in (0.0, poison):
        k, v = (_poisoned(x, padding, hidden_value) for x in (key, value))
        if sharing == "key is value":
            v = k
        mask = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).masked_fill(padding, -INF)
        arguments = [query, k, v, mask if as_float else padding]
        if layout == "unbatched":
            arguments = [x.detach()[0].requires_grad_(x.requires_grad) for x in arguments]
            arguments[2] = arguments[1] if v is k else arguments[2]
        elif layout == "sequence first":
            arguments[:3] = [x.detach().transpose(0, 1).requires_grad_(x.requires_grad) for x in arguments[:3]]
            arguments[2] = arguments[1] if v is k else arguments[2]
        with fused_mha.backend(back_end):
            runs.append(_run(module, *arguments, need_weights=need_weights))
    for clean, poisoned in zip(*runs, strict=True):
        assert poisoned.isfinite().all()
        rounding = 1e-6 * clean.abs().max().item()  # sums whose terms cancel
        torch.testing.assert_close(poisoned, clean, rtol=1e-4, atol=1e-5 + rounding)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_nan_in_padded_positions_of_self_attention_reaches_nothing(need_weights, back_end):
    module, x = random_module(), torch.randn(3, 6, 8)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    with forced(back_end, need_weights):
        poisoned = _poisoned(x, padding, NAN).requires_grad_()
        output, weights = module(poisoned, poisoned, poisoned, padding, need_weights=need_weights)
        gradients = torch.autograd.grad(output.sum(), [poisoned, *module.parameters()])
        expected, expected_weights = module(x, x, x, padding, need_weights=need_weights)
    torch.testing.assert_close(output[~padding], expected[~padding])
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if need_weights:
        torch.testing.assert_close(weights[~padding], expected_weights[~padding])


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_nan_in_a_hidden_key_stays_out_under_autocast_and_compile(back_end):
    module, query = random_module(), torch.randn(3, 4, 8)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 4:] = True
    key = _poisoned(torch.randn(3, 6, 8), padding, NAN)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with fused_mha.backend(back_end):
        with torch.autocast("cpu", torch.bfloat16):
            results = _run(module, query, key, key, padding, need_weights=False)
        output, _ = compiled(query, key, key, padding, need_weights=False)
    assert all(x.isfinite().all() for x in results)
    assert output.isfinite().all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_nan_in_a_visible_key_stays_in_its_batch_element(back_end):
    module, query, key = random_module(), torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    key[1, 2] = NAN
    with fused_mha.backend(back_end):
        output, _ = module(query, key, key, torch.zeros(3, 6, dtype=torch.bool), need_weights=False)
    assert output[[0, 2]].isfinite().all()
    assert output[1].isnan().all()

"""What differs from torch on purpose, by the numbers of docs/differences.md.

Numbers 2 and 6 are in test_deviations_masking.py, 4 in test_inside_torch_projections.py.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import fused_mha
from calls import BACK_ENDS, CALLS, INF, WEIGHTS, WITH_WEIGHTS, forced, random_module
from closeness import assert_close_to_oracle, in_fp64
from fused_mha import MultiHeadAttention
from fused_mha.testing import Case, assert_parity
from fused_mha.testing.strategies import DTYPES

# 1. One behaviour in every mode


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(N=1, L=1, num_heads=2),
        Case(N=3, L=65, embed_dim=48, num_heads=3, attn_mask="bool", key_padding_mask="bool"),
        Case(L=33, attn_mask="float per head", dtype=torch.float64),
        Case(sharing="cross", kdim=9, vdim=9, add_bias_kv=True, add_zero_attn=True),
        Case(sharing="separate", key_padding_mask="float", batch_first=False),
        Case(L=40, is_causal=True, key_padding_mask="bool"),
        Case(L=16, dtype=torch.bfloat16, attn_mask="causal bool"),
        Case(L=16, dtype=torch.float16, is_causal=True),
        Case(batched=False, bias=False),
        Case(N=0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("back_end", "need_weights"), CALLS)
def test_every_mode_gives_the_same_bits(case, back_end, need_weights):
    if back_end == "sdpa" and case.N == 0:
        back_end = "reference"
    module, _, inputs, arguments = case._replace(need_weights=need_weights).build()
    with fused_mha.backend(back_end):
        output, weights = module.train()(*inputs, **arguments)
        for training in (True, False):
            module.train(training)
            for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with mode():
                    same_output, same_weights = module(*inputs, **arguments)
                assert torch.equal(same_output, output)
                assert same_output.stride() == output.stride()
                assert weights is None or torch.equal(same_weights, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_padding_mask", [None, "float"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_output_is_the_same_with_and_without_weights(dtype, key_padding_mask, back_end):
    case = Case(L=33, attn_mask="float", key_padding_mask=key_padding_mask, dtype=dtype)
    ours, theirs, inputs, arguments = case.build()
    exact = copy.deepcopy(theirs).double()

    def oracle():
        return {"output": exact(*(x.double() for x in inputs), **in_fp64(arguments))[0]}

    for need_weights in (True, False):
        arguments["need_weights"] = need_weights
        with forced(back_end, need_weights):
            output, _ = ours(*inputs, **arguments)
        assert_close_to_oracle({"output": output}, {"output": theirs(*inputs, **arguments)[0]}, oracle, terms=33)


# 3. is_causal=True is real


@WEIGHTS
@pytest.mark.parametrize("key_padding_mask", [None, "bool", "float"])
@pytest.mark.parametrize("attn_mask", ["causal bool", "causal float"])
@pytest.mark.parametrize(("L", "sharing"), [(5, "self"), (4, "cross"), (9, "cross")], ids=["L=S", "L<S", "L>S"])
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
def test_is_causal_alone_does_what_the_causal_mask_does(
    L, sharing, attn_mask, key_padding_mask, need_weights, average, back_end
):
    case = Case(
        L=L,
        sharing=sharing,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        average_attn_weights=average,
    )
    ours, theirs, inputs, arguments = case.build()

    def hinted(*args: Tensor, attn_mask: Tensor, is_causal: bool, **rest: object) -> object:
        return MultiHeadAttention.forward(ours, *args, **rest, is_causal=True)

    ours.forward = hinted
    with forced(back_end, need_weights):
        assert_parity(ours, theirs, *inputs, **arguments)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_is_causal_and_attn_mask_both_apply(need_weights, batched, back_end):
    case = Case(sharing="cross", attn_mask="float", batched=batched, need_weights=need_weights)
    module, _, inputs, arguments = case.build()
    future = torch.ones(case.L, case.S, dtype=torch.bool).triu(1)
    merged = {**arguments, "attn_mask": arguments["attn_mask"].masked_fill(future, -INF)}
    with forced(back_end, need_weights):
        output, weights = module(*inputs, **{**arguments, "is_causal": True})
        expected, expected_weights = module(*inputs, **merged)
        unhinted, _ = module(*inputs, **arguments)
    assert torch.equal(output, expected)
    assert not torch.equal(output, unhinted)
    if need_weights:
        assert torch.equal(weights, expected_weights)
        assert not weights[..., future].any()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_virtual_keys_stay_visible_under_is_causal(need_weights, back_end):
    case = Case(add_bias_kv=True, add_zero_attn=True, attn_mask="causal bool", need_weights=need_weights)
    module, theirs, inputs, arguments = case.build()
    expected, expected_weights = theirs(*inputs, **arguments)  # without the hint torch reads its mask
    with forced(back_end, need_weights):
        for attn_mask in (arguments["attn_mask"], None):
            output, weights = module(*inputs, need_weights=need_weights, attn_mask=attn_mask, is_causal=True)
            torch.testing.assert_close(output, expected)
            if need_weights:
                torch.testing.assert_close(weights, expected_weights)
                assert (weights[..., -2:] > 0).all()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_is_causal_hides_the_future_from_outputs_and_gradients(need_weights, back_end):
    module = random_module()
    x = torch.randn(1, 6, 8, requires_grad=True)
    with forced(back_end, need_weights):
        output, _ = module(x, x, x, is_causal=True, need_weights=need_weights)
    (gradient,) = torch.autograd.grad(output[:, 2].sum(), x)
    assert (gradient[:, :3] != 0).any(-1).all()
    assert torch.equal(gradient[:, 3:], torch.zeros(1, 3, 8))


# 5. Dropout


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
def test_dropout_is_reproducible_under_one_seed(need_weights, back_end):
    module, _, inputs, arguments = Case(N=3, L=17, dropout=0.4, need_weights=need_weights).build()
    outputs = []
    with fused_mha.backend(back_end):
        for seed in (11, 11, 12):
            torch.manual_seed(seed)
            outputs += [module(*inputs, **arguments)[0] for _ in range(2)]
    first, second, *again = outputs
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    assert not torch.equal(second, first)
    assert not torch.equal(again[2], first)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_the_reference_draws_as_torch(need_weights):
    case = Case(N=3, L=17, S=9, sharing="cross", dropout=0.4, need_weights=need_weights)
    ours, theirs, inputs, arguments = case.build()
    outputs = []
    with fused_mha.backend("reference"):
        for module in (ours, theirs):
            torch.manual_seed(11)
            outputs.append((module(*inputs, **arguments)[0], torch.get_rng_state()))
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
def test_dropout_keeps_weights_scaled_by_what_is_left(back_end):
    module = random_module(dropout=0.25)
    x = torch.randn(4, 32, 8)
    with fused_mha.backend(back_end):
        _, weights = module(x, x, x, average_attn_weights=False)
        _, expected = module.eval()(x, x, x, average_attn_weights=False)
    dropped = weights == 0
    torch.testing.assert_close(weights, (expected / 0.75).masked_fill(dropped, 0.0))
    spread = math.sqrt(0.25 * 0.75 / dropped.numel())
    assert abs(dropped.double().mean() - 0.25) < 5 * spread


# 7. Masks of any floating dtype, and 4-D


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_float_mask_of_any_dtype_means_what_its_numbers_say(dtype, mask_dtype, need_weights, back_end):
    case = Case(attn_mask="float", key_padding_mask="float", sharing="cross", dtype=dtype, need_weights=need_weights)
    module, _, inputs, arguments = case.build()
    masks = {name: arguments.pop(name).bfloat16().to(mask_dtype) for name in ("attn_mask", "key_padding_mask")}
    with forced(back_end, need_weights):
        output, weights = module(*inputs, **masks, **arguments)
        same = {name: mask.to(torch.promote_types(dtype, torch.float32)) for name, mask in masks.items()}
        expected, expected_weights = module(*inputs, **same, **arguments)
    assert torch.equal(output, expected)
    assert weights is None or torch.equal(weights, expected_weights)


@pytest.mark.parametrize("back_end", WITH_WEIGHTS)
def test_bool_and_float_masks_mix_without_a_warning(back_end):
    case = Case(sharing="cross", attn_mask="float", key_padding_mask="bool")
    ours, theirs, inputs, arguments = case.build()
    with fused_mha.backend(back_end):
        output, weights = ours(*inputs, **arguments)  # a warning would be an error here
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        expected = theirs(*inputs, **arguments)
    torch.testing.assert_close((output, weights), expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 4), (3, 1, 4), (1, 2, 4), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_4d_mask_broadcasts_to_the_3d_mask_of_torch(size, kind, need_weights, back_end):
    case = Case(N=3, L=4, S=6, embed_dim=8, num_heads=2, sharing="cross", need_weights=need_weights)
    module, theirs, inputs, arguments = case.build()
    mask = torch.rand(*size, 6) < 0.4
    mask[..., 0] = False
    if kind == "float":
        mask = torch.randn(*size, 6).masked_fill(mask, -INF)
    with forced(back_end, need_weights):
        result = module(*inputs, **{**arguments, "attn_mask": mask})
    full = mask.expand(3, 2, 4, 6).reshape(6, 4, 6)
    torch.testing.assert_close(result, theirs(*inputs, **{**arguments, "attn_mask": full}))


# 8. Output is contiguous


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(batch_first=False),
        Case(batched=False),
        Case(strides="transposed"),
        Case(strides="expanded", batch_first=False),
        Case(sharing="separate", kdim=3, L=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_output_is_contiguous_in_every_layout(case, training, need_weights, back_end):
    module, _, inputs, arguments = case._replace(training=training, need_weights=need_weights).build()
    for out_proj in (module.out_proj, nn.Identity()):  # a Linear copies its input; others see the merged heads' layout
        module.out_proj = out_proj
        with forced(back_end, need_weights):
            output, _ = module(*inputs, **arguments)
        assert output.shape == inputs[0].shape
        assert output.is_contiguous()

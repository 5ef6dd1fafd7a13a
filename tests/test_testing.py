"""The parity kit: what `assert_parity` passes, what it catches, what it says, and what it leaves alone."""

import copy
import dataclasses
import math
import re
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch import nn

import fused_mha
from fused_mha import MultiHeadAttention, explain
from fused_mha.core.inputs import default_scale
from fused_mha.module import one_call, steps
from fused_mha.testing import Case, assert_parity, compare, grid

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
WRONG = 1.001


def build(**fields):
    ours, theirs, inputs, arguments = Case(**fields).build()
    return ours, theirs, inputs, arguments


class WrongOutput(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output * WRONG, weights


class WrongWeights(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output, weights * WRONG


class WrongScale(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        def wrong_scale(head_dim):
            return default_scale(head_dim) * WRONG

        with ExitStack() as patches:
            for module in (one_call, steps):
                patches.enter_context(patch.object(module, "default_scale", wrong_scale))
            return super().forward(*args, **kwargs)


class NoWeights(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[0], None


class OneNaN(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        nan = torch.zeros_like(output)
        nan[1, 2, 3] = float("nan")
        return output + nan, weights


class OtherShape(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output[:, :1], weights


class OtherDtype(MultiHeadAttention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output.double(), weights


class WrongInputGradient(MultiHeadAttention):
    wrong = "query"

    def forward(self, query, key, value, *args, **kwargs):
        inputs = {"query": query, "key": key, "value": value}
        x = inputs[self.wrong]
        inputs[self.wrong] = x * WRONG - x.detach() * (WRONG - 1.0)
        return super().forward(*inputs.values(), *args, **kwargs)


def wrong(cls, **fields):
    """A module of this class, torch's, and the arguments of a call."""
    ours, theirs, inputs, arguments = build(**fields)
    ours.__class__ = cls
    return ours, theirs, inputs, arguments


class TestPasses:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_equal_modules_and_returns_every_comparison(self, dtype):
        ours, theirs, inputs, arguments = build(sharing="separate", dtype=dtype)
        comparisons = assert_parity(ours, theirs, *inputs, **arguments)
        assert [comparison.quantity for comparison in comparisons] == [
            "state_dict",
            "output",
            "weights",
            *(f"grad of {name}" for name in ("query", "key", "value")),
            *(f"grad of {name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
        ]
        assert all(comparison.agrees for comparison in comparisons)
        assert all(comparison.tolerance > 0.0 for comparison in comparisons[1:])

    def test_a_module_with_itself(self):
        module = nn.Linear(4, 3)
        assert [c.quantity for c in assert_parity(module, module, torch.randn(5, 4))] == [
            "state_dict",
            "output",
            "grad of query",
            "grad of weight",
            "grad of bias",
        ]

    @pytest.mark.parametrize(
        ("module", "shapes"),
        [(nn.GELU(), [(3, 4)]), (nn.LSTM(4, 3), [(5, 2, 4)]), (nn.Bilinear(3, 4, 2), [(5, 3), (5, 4)])],
        ids=["no parameters", "nested outputs", "two inputs"],
    )
    def test_other_modules_than_attention(self, module, shapes):
        if isinstance(module, nn.LSTM):
            module = FirstOutput(module)
        assert_parity(copy.deepcopy(module), module, *(torch.randn(shape) for shape in shapes))

    def test_only_outputs_are_compared_without_grad_mode(self):
        ours, theirs, inputs, arguments = build()
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                comparisons = assert_parity(ours, theirs, *inputs, **arguments)
            assert [comparison.quantity for comparison in comparisons] == ["state_dict", "output", "weights"]

    def test_frozen_parameters_are_not_compared(self):
        ours, theirs, inputs, arguments = build()
        for module in (ours, theirs):
            module.in_proj_weight.requires_grad_(False)
        names = [comparison.quantity for comparison in assert_parity(ours, theirs, *inputs, **arguments)]
        assert "grad of in_proj_weight" not in names
        assert "grad of out_proj.weight" in names

    def test_equal_nan_parameters(self):
        ours, theirs, inputs, arguments = build()
        for module in (ours, theirs):
            module.out_proj.bias.data[3] = float("nan")
        assert_parity(ours, theirs, *inputs, **arguments)

    def test_float_masks_that_require_a_gradient_have_theirs_compared(self):
        ours, theirs, inputs, _ = build()
        mask = torch.zeros(5, 5, requires_grad=True)
        quantities = [c.quantity for c in assert_parity(ours, theirs, *inputs, attn_mask=mask)]
        assert "grad of attn_mask" in quantities
        quantities = [c.quantity for c in assert_parity(ours, theirs, *inputs, attn_mask=mask.detach())]
        assert "grad of attn_mask" not in quantities

    @pytest.mark.parametrize("dropout", [0.3, 1.0])
    def test_dropout_draws_from_the_seed_in_both(self, dropout):
        ours, theirs, inputs, arguments = build(dropout=dropout)
        assert_parity(ours, theirs, *inputs, seed=3, **arguments)

    @pytest.mark.parametrize(
        ("dropout", "training", "back_end"), [(0.3, True, "reference"), (0.3, False, "cpu"), (0.0, True, "cpu")]
    )
    def test_only_dropout_of_weights_is_compared_on_the_reference_core(self, dropout, training, back_end):
        theirs = nn.TransformerEncoderLayer(16, 4, 16, dropout=0.3, batch_first=False).train(training)
        theirs.self_attn.dropout = dropout
        ours = copy.deepcopy(theirs)
        fused_mha.convert(ours)
        chosen = []
        ours.self_attn.register_forward_pre_hook(lambda attention, x: chosen.append(explain(attention, x[0]).chosen))
        assert_parity(ours, theirs, torch.randn(5, 2, 16), seed=3)
        assert chosen == [back_end]

    def test_dropout_behind_an_output_that_is_a_transpose_in_torch(self):
        theirs = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True)
        ours = copy.deepcopy(theirs)
        fused_mha.convert(ours)
        dropout = nn.functional.dropout
        assert_parity(ours, theirs, torch.randn(2, 5, 16))
        assert nn.functional.dropout is dropout

    def test_dropout_of_our_module_with_itself(self):
        ours, _, inputs, arguments = build(dropout=0.3)
        assert_parity(ours, ours, *inputs, **arguments)


class FirstOutput(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class TestCatchesOnePartInAThousand:
    @DTYPES
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("cls", "quantity"), [(WrongOutput, "output"), (WrongWeights, "weights"), (WrongScale, "weights")]
    )
    def test_in_the_forward(self, cls, quantity, training, dtype):
        ours, theirs, inputs, arguments = wrong(cls, training=training, dtype=dtype)
        with pytest.raises(AssertionError, match=f"quantities differ .*\n(.*\n)*  {quantity}: largest error"):
            assert_parity(ours, theirs, *inputs, **arguments)
        with torch.no_grad(), pytest.raises(AssertionError, match=f"  {quantity}: largest error"):
            assert_parity(ours, theirs, *inputs, **arguments)

    @DTYPES
    def test_in_the_scale_without_weights(self, dtype):
        ours, theirs, inputs, _ = wrong(WrongScale, dtype=dtype)
        with pytest.raises(AssertionError, match="output: largest error"):
            assert_parity(ours, theirs, *inputs, need_weights=False)

    @DTYPES
    @pytest.mark.parametrize(
        "name",
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight"],
    )
    def test_in_the_gradient_of_one_parameter(self, name, dtype):
        ours, theirs, inputs, arguments = build(kdim=12, sharing="separate", add_bias_kv=True, dtype=dtype)
        ours.get_parameter(name).register_hook(lambda gradient: gradient * WRONG)
        different = [c.quantity for c in compare(ours, theirs, *inputs, **arguments) if not c.agrees]
        assert different == [f"grad of {name}"]
        with pytest.raises(AssertionError, match=f"^1 of 14 quantities differ .*\n  grad of {re.escape(name)}: "):
            assert_parity(ours, theirs, *inputs, **arguments)

    @DTYPES
    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_in_the_gradient_of_one_input(self, name, dtype):
        ours, theirs, inputs, arguments = wrong(WrongInputGradient, sharing="separate", dtype=dtype)
        ours.wrong = name
        different = [c.quantity for c in compare(ours, theirs, *inputs, **arguments) if not c.agrees]
        assert different == [f"grad of {name}"]

    @DTYPES
    def test_in_the_gradient_of_a_float_mask(self, dtype):
        class WrongMaskGradient(MultiHeadAttention):
            def forward(self, *args, attn_mask, **kwargs):
                attn_mask = attn_mask * WRONG - attn_mask.detach() * (WRONG - 1.0)
                return super().forward(*args, attn_mask=attn_mask, **kwargs)

        ours, theirs, inputs, _ = wrong(WrongMaskGradient, dtype=dtype)
        mask = torch.randn(5, 5, dtype=dtype, requires_grad=True)
        different = [c.quantity for c in compare(ours, theirs, *inputs, attn_mask=mask) if not c.agrees]
        assert different == ["grad of attn_mask"]

    @DTYPES
    def test_in_one_entry_alone(self, dtype):
        theirs = nn.Linear(8, 8, dtype=dtype)
        ours = copy.deepcopy(theirs)
        ours.register_forward_hook(lambda _m, _i, output: output + nn.functional.one_hot(torch.tensor(5), 8) * 1e-3)
        with pytest.raises(AssertionError, match=r"output: largest error 1\.0\d+e-03 at \[\d, 5\]"):
            assert_parity(ours, theirs, torch.randn(4, 8, dtype=dtype))

    def test_in_a_module_that_is_no_attention(self):
        theirs = nn.Linear(8, 8)
        ours = copy.deepcopy(theirs)
        ours.bias.register_hook(lambda gradient: gradient * WRONG)
        different = [c.quantity for c in compare(ours, theirs, torch.randn(4, 8)) if not c.agrees]
        assert different == ["grad of bias"]


class TestCatches:
    def check(self, ours, theirs, inputs, arguments, text):
        with pytest.raises(AssertionError, match=text):
            assert_parity(ours, theirs, *inputs, **arguments)

    def test_one_bit_of_the_state_dict(self):
        ours, theirs, inputs, arguments = build()
        weight = ours.in_proj_weight.data
        weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(math.inf))
        text = re.escape("state_dict: values or dtypes differ in ['in_proj_weight']")
        self.check(ours, theirs, inputs, arguments, text)

    def test_the_sign_of_a_zero_in_the_state_dict(self):
        ours, theirs, inputs, arguments = build()
        ours.out_proj.bias.data[0] = -0.0
        theirs.out_proj.bias.data[0] = 0.0
        self.check(ours, theirs, inputs, arguments, r"state_dict: .*\['out_proj.bias'\]")

    def test_another_dtype_in_the_state_dict(self):
        ours, theirs, inputs, arguments = build()
        ours.register_buffer("extra", torch.zeros(1, dtype=torch.float16))
        theirs.register_buffer("extra", torch.zeros(1))
        text = re.escape("state_dict: values or dtypes differ in ['extra']")
        self.check(ours, theirs, inputs, arguments, text)

    def test_other_names_in_the_state_dict(self):
        ours, theirs, inputs, arguments = build()
        ours.register_buffer("extra", torch.zeros(1))
        self.check(ours, theirs, inputs, arguments, r"state_dict: keys \[.*'extra'.*\], expected \[")

    @pytest.mark.parametrize(
        ("cls", "text"),
        [
            (NoWeights, r"  weights: None, expected shape \(2, 5, 5\) torch.float32"),
            (OneNaN, r"  output: largest error inf at \[1, 2, 3\], tolerance \d"),
            (OtherShape, r"  output: shape \(2, 1, 16\) torch.float32, expected shape \(2, 5, 16\) torch.float32"),
            (OtherDtype, r"  output: shape \(2, 5, 16\) torch.float64, expected shape \(2, 5, 16\) torch.float32"),
        ],
        ids=["missing weights", "NaN", "shape", "dtype"],
    )
    def test_outputs_that_are_no_matter_of_tolerance(self, cls, text):
        ours, theirs, inputs, arguments = wrong(cls)
        with torch.no_grad():
            self.check(ours, theirs, inputs, arguments, text)

    def test_weights_that_were_not_asked_for(self):
        theirs = nn.MultiheadAttention(16, 4)
        ours = copy.deepcopy(theirs)
        ours.register_forward_hook(lambda _m, _i, output: (output[0], torch.zeros(2)))
        inputs = [torch.randn(5, 2, 16)] * 3
        self.check(ours, theirs, inputs, {"need_weights": False}, r"weights: shape \(2,\) torch.float32, expected None")

    def test_a_missing_gradient(self):
        theirs = nn.Linear(4, 4)
        ours = copy.deepcopy(theirs)
        ours.forward = lambda x: nn.functional.linear(x, ours.weight, ours.bias.detach())
        self.check(ours, theirs, [torch.randn(2, 4)], {}, r"grad of bias: None, expected shape \(4,\) torch.float32")

    def test_the_gradient_of_an_input_that_a_parameter_is_named_as(self):
        class Pooling(nn.Module):
            def __init__(self, factor):
                super().__init__()
                self.query, self.factor = nn.Parameter(torch.ones(4)), factor

            def forward(self, x):
                y = x * self.query
                return y if self.factor == 1.0 else Scaled.apply(y)

        class Scaled(torch.autograd.Function):
            forward = staticmethod(lambda ctx, x: x.clone())
            backward = staticmethod(lambda ctx, grad: grad * 7.0)

        self.check(Pooling(7.0), Pooling(1.0), [torch.randn(2, 4)], {}, "grad of query: largest error")

    def test_a_result_in_a_dataclass(self):
        @dataclasses.dataclass
        class Output:
            hidden: torch.Tensor

        theirs = nn.Linear(4, 4)
        theirs.register_forward_hook(lambda _m, _i, y: Output(y))
        ours = copy.deepcopy(theirs)
        ours.register_forward_hook(lambda _m, _i, output: Output(output.hidden * 1.01))
        self.check(ours, theirs, [torch.randn(2, 4)], {}, "hidden: largest error")

    def test_a_nan_in_the_oracle_alone(self):
        class Root(nn.Module):
            def forward(self, x):
                return x / 0.0 * 0.0 if x.dtype == torch.float64 else x

        self.check(Root(), Root(), [torch.randn(2, 4)], {}, "not finite in fp64 where it is in torch.float32")

    def test_another_mode(self):
        ours, theirs, inputs, arguments = build()
        ours.eval()
        self.check(ours, theirs, inputs, arguments, "mode: ours.training is False, theirs.training is True")

    def test_names_quantity_error_index_tolerance_and_seed(self):
        ours, theirs, inputs, arguments = wrong(WrongOutput)
        with torch.no_grad(), pytest.raises(AssertionError) as raised:
            assert_parity(ours, theirs, *inputs, seed=11, **arguments)
        (comparison,) = (c for c in compare(ours, theirs, *inputs, seed=11, **arguments) if c.quantity == "output")
        with torch.no_grad():
            exact = copy.deepcopy(theirs).double()(*(x.double() for x in inputs))[0]
            distance = (ours(*inputs, **arguments)[0].double() - exact).abs()
        assert distance[comparison.where].item() == distance.max().item() == comparison.error
        assert str(raised.value) == (
            "1 of 3 quantities differ (seed 11):\n"
            f"  output: largest error {comparison.error:.3e} at {list(comparison.where)}, tolerance "
            f"{comparison.tolerance:.3e} (torch's own error {comparison.torch_error:.3e})"
        )


class TestChangesNothing:
    def test_modules_inputs_and_random_numbers(self):
        ours, theirs, inputs, arguments = build(dropout=0.5, attn_mask="float")
        modules = (ours, theirs)
        before = [copy.deepcopy(vars(module)["_parameters"]) for module in modules]
        copies = [x.clone() for x in (*inputs, arguments["attn_mask"])]
        state = torch.get_rng_state()
        assert_parity(*modules, *inputs, **arguments)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(x, y) for x, y in zip((*inputs, arguments["attn_mask"]), copies, strict=True))
        assert not any(x.requires_grad or x.grad is not None for x in inputs)
        for module, parameters in zip(modules, before, strict=True):
            assert module.training
            assert all(parameter.grad is None for parameter in module.parameters())
            assert all(torch.equal(getattr(module, name), x) for name, x in parameters.items() if x is not None)

    def test_inputs_that_require_a_gradient_get_none(self):
        ours, theirs, inputs, arguments = build()
        x = inputs[0].requires_grad_()
        assert_parity(ours, theirs, x, x, x, **arguments)
        assert x.grad is None

    def test_buffers_that_the_forward_updates(self):
        theirs = nn.BatchNorm1d(4)
        ours = copy.deepcopy(theirs)
        assert_parity(ours, theirs, torch.randn(8, 4))
        for module in (ours, theirs):
            assert module.num_batches_tracked.item() == 0
            assert torch.equal(module.running_mean, torch.zeros(4))


class TestGrid:
    def test_full_grid_holds_the_short_one(self):
        short, full = list(grid()), list(grid(full=True))
        assert full[: len(short)] == short
        assert len(full) > 1.5 * len(short)

    def test_case_prints_what_is_not_default(self):
        assert str(Case()) == "plain, float32: defaults"
        case = Case("masks", L=3, attn_mask="bool", dtype=torch.float16)
        assert str(case) == "masks, float16: L=3 attn_mask=bool"

    def test_case_builds_equal_modules_from_the_seed_alone(self):
        ours, theirs, inputs, _ = build(dropout=0.5)
        again = build(dropout=0.5)
        assert all(torch.equal(a, b) for a, b in zip(inputs, again[2], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again[1].parameters(), strict=True))
        assert type(theirs) is nn.MultiheadAttention
        assert type(ours) is fused_mha.MultiHeadAttention
        other = Case(dropout=0.5).build(seed=1)
        assert not torch.equal(other[2][0], inputs[0])

"""First and second derivatives of the CPU library's results against numeric ones, in fp64."""

import functools

import pytest
import torch

import differentiation
from attention_oracle import make_arguments
from native.dense_oracle import drawn_seed, native_attention

PER_HEAD = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
WANTED = {"output": {}, "averaged": {"need_weights": True}, "everything": PER_HEAD}
CASES = differentiation.CASES | {
    "float mask of the keys": {"mask_dtype": torch.float64, "mask_shape": "S"},
    "dropout": {"dropout_p": 0.4, "mask_dtype": torch.float64},
    "empty rows": {"mask_dtype": torch.bool, "hidden": 0.9},
}
SHAPE = {"N": 2, "L": 3, "S": 4, "H": 2, "H_kv": 2, "D": 2, "D_v": 3, "dtype": torch.float64}
as_function = functools.partial(differentiation.as_function, native_attention)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_through_everything_are_the_numeric_ones(base_isa, case):
    function, values = as_function(make_arguments(**SHAPE | {"N": 1} | case | PER_HEAD))
    with drawn_seed(1, 2):
        assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}], ids=["output", "averaged"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_the_numeric_ones(case, wanted):
    function, values = as_function(make_arguments(**SHAPE | case | wanted))
    with drawn_seed(1, 2):
        assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("wanted", [{"need_weights": True}, PER_HEAD], ids=["averaged", "everything"])
def test_gradients_through_the_weights_alone_are_the_numeric_ones(base_isa, wanted):
    function, values = as_function(make_arguments(**SHAPE, mask_dtype=torch.float64, **wanted), ("output", "lse"))
    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_second_derivatives_are_the_numeric_ones(case, wanted):
    function, values = as_function(make_arguments(**SHAPE | {"N": 1, "L": 2, "S": 3} | case | wanted))
    with drawn_seed(1, 2):
        assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("forget", [("output", "lse"), ("output", "weights")], ids=["weights", "lse"])
def test_second_derivatives_through_one_result_alone(forget):
    function, values = as_function(make_arguments(**SHAPE | {"N": 1, "L": 2, "S": 3}, **PER_HEAD), forget)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_penalty_reaches_every_input_in_every_dtype(isa, dtype):
    arguments = make_arguments(L=5, S=6, dtype=dtype, mask_dtype=dtype, hidden=0.0, bias_kv=True)
    function, values = as_function(arguments)
    gradients = torch.autograd.grad(function(*values)[0].float().square().sum(), values, create_graph=True)
    penalty = sum(x.float().square().sum() for x in gradients)
    for x, second in zip(values, torch.autograd.grad(penalty, values), strict=True):
        assert second.dtype == x.dtype
        assert second.shape == x.shape
        assert bool(second.isfinite().all())
        assert bool((second != 0).any())


def test_third_derivatives_are_the_numeric_ones():
    query, key = (torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def second(query, key):
        output = native_attention(query=query, key=key, value=key).output
        (first,) = torch.autograd.grad(output.sin().sum(), query, create_graph=True)
        (result,) = torch.autograd.grad(first.sin().sum(), key, create_graph=True)
        return result

    assert torch.autograd.gradcheck(second, (query, key))

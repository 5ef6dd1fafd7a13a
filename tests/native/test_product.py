"""The matrix product of the C++ library and its operator, on every instruction set."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_mha.backends.cpu import LIBRARY, product
from fused_mha.ops.product import product as operator
from native.c_abi import ISAS_OF
from native.call_space import DTYPES
from native.module_call import ProductCall

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TRANSPOSED = list(itertools.product([False, True], repeat=2))


def operands(M, N, K, dtype=torch.float32, left=False, right=False, wider=0):
    """A, B as they lie in rows that are `wider` than they need to be, and a bias."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn((*size[:-1], size[-1] + wider), generator=generator).to(dtype)[..., : size[-1]]

    return draw(*((K, M) if left else (M, K))), draw(*((N, K) if right else (K, N))), draw(N)


def exactly(a, b, bias, left, right):
    a, b = a.double(), b.double()
    result = (a.t() if left else a) @ (b.t() if right else b)
    return result if bias is None else result + bias.double()


def assert_right(a, b, bias, left, right):
    result, exact = product(a, b, bias, left, right), exactly(a, b, bias, left, right)
    assert result.shape == exact.shape
    assert result.dtype == a.dtype
    if not result.numel():
        return
    # Each sum of K products errs by at most K roundings of the accumulator, and once by that of the result.
    accumulator = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32)
    K = a.shape[0 if left else 1]
    size = exactly(a.abs(), b.abs(), None if bias is None else bias.abs(), left, right)
    bound = size * accumulator.eps * (K + 2) + exact.abs() * torch.finfo(a.dtype).eps + 1e-30
    assert bool(((result.double() - exact).abs() <= bound).all())


@each_dtype
@pytest.mark.parametrize(("left", "right"), TRANSPOSED)
def test_products_match_fp64(isa, left, right, dtype):
    sizes = ((1, 1, 1), (5, 7, 3), (64, 96, 48), (130, 257, 301), (14, 32, 128), (300, 33, 513))
    a_few_rows_by_several_tasks = ((3, 601, 701), (701, 601, 3))
    for M, N, K in (*sizes, *a_few_rows_by_several_tasks):
        a, b, bias = operands(M, N, K, dtype, left, right, wider=3)
        assert_right(a, b, bias, left, right)
        assert_right(a, b, None, left, right)


@pytest.mark.parametrize(("left", "right"), TRANSPOSED)
def test_no_rows_columns_or_terms(base_isa, left, right):
    for sizes in ((0, 4, 5), (4, 0, 5), (4, 5, 0), (0, 0, 0)):
        assert_right(*operands(*sizes, left=left, right=right), left, right)


@given(st.tuples(*[st.integers(0, 150)] * 3), st.sampled_from(DTYPES), st.sampled_from(TRANSPOSED), st.integers(0, 5))
def test_any_sizes(sizes, dtype, transposed, wider):
    for isa in ISAS_OF[dtype]:
        former = LIBRARY.isa
        LIBRARY.set_isa(isa)
        try:
            assert_right(*operands(*sizes, dtype, *transposed, wider), *transposed)
        finally:
            LIBRARY.set_isa(former)


@each_dtype
def test_threads_and_rows_beside_it_change_no_bit_of_a_row(isa, dtype, set_num_threads):
    a, b, bias = operands(301, 200, 300, dtype, right=True)
    set_num_threads(1)
    alone = product(a, b, bias, False, True)
    for threads in (2, 3, 4):
        set_num_threads(threads)
        assert torch.equal(product(a, b, bias, False, True), alone)
    assert torch.equal(product(a[100:140], b, bias, False, True), alone[100:140])


@each_dtype
@pytest.mark.parametrize(("left", "right"), [(False, True), (False, False), (True, False)])
def test_threads_change_no_bit_of_products_of_a_few_rows(isa, left, right, dtype, set_num_threads):
    a, b, bias = operands(*((701, 601, 8) if left else (8, 601, 701)), dtype, left, right)
    set_num_threads(1)
    alone = product(a, b, bias, left, right)
    for threads in 8 * (2, 3):  # of which not all meet each other on a busy machine
        set_num_threads(threads)
        assert torch.equal(product(a, b, bias, left, right), alone)


def test_nothing_beside_the_result_is_written(base_isa):
    # The last row and column fall into whole vectors, whose rest must not reach the rows of other tensors.
    for M, N in itertools.product((1, 13, 15), (1, 17, 31, 33)):
        a, b, bias = operands(M, N, 5, right=True)
        before = [x.clone() for x in (a, b, bias)]
        result = product(a, b, bias, False, True)
        assert result.is_contiguous()
        assert all(torch.equal(x, y) for x, y in zip((a, b, bias), before, strict=True))


@pytest.mark.parametrize(("left", "right"), TRANSPOSED)
def test_the_operator_is_differentiable_twice_and_traceable(left, right):
    a, b, bias = (x.requires_grad_() for x in operands(4, 3, 6, torch.float64, left, right))
    assert torch.autograd.gradcheck(lambda *x: operator(*x, left, right), (a, b, bias))
    assert torch.autograd.gradgradcheck(lambda *x: operator(*x, left, right), (a, b, bias))
    torch.library.opcheck(operator, (a, b, bias, left, right))


def test_an_expanded_gradient_is_taken():
    a, b, _ = operands(4, 3, 6, right=True)
    a.requires_grad_()
    operator(a, b, None, False, True).sum().backward()
    assert torch.allclose(a.grad, b.sum(0).expand(4, 6))


def sequences(x, batch, layout):
    """The rows of a matrix as those of a batch of sequences, in one of several memory layouts."""
    x = x.reshape(batch, x.shape[0] // batch, x.shape[1])
    if layout == "sequence first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "slice":
        wide = x.new_full((batch, x.shape[1] + 3, x.shape[2] + 5), float("nan"))
        wide[:, 1:-2, 2:-3] = x
        return wide[:, 1:-2, 2:-3]
    return x


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "sequence first", "slice"])
@pytest.mark.parametrize(("left", "right"), TRANSPOSED)
@pytest.mark.parametrize("sizes", [(6, 36, 12), (60, 90, 54), (66, 12, 150), (1, 300, 30), (6, 6, 6)], ids=str)
def test_rows_of_sequences_are_those_of_a_matrix(isa, left, right, layout, sizes, dtype):
    a, b, bias = operands(*sizes, dtype, left, right)
    expected = product(a, b, bias, left, right)
    for batch_a, batch_b, batch_c in itertools.product((1, 2, 6), (1, 3), (1, 2)):
        if a.shape[0] % batch_a or b.shape[0] % batch_b or expected.shape[0] % batch_c:
            continue
        output = sequences(torch.full_like(expected, float("nan")), batch_c, layout)
        operand_a, operand_b = sequences(a, batch_a, layout), sequences(b, batch_b, layout)
        assert ProductCall(operand_a, operand_b, output, (left, right), bias).error() is None
        assert torch.equal(output.reshape(expected.shape), expected)


def test_a_sequence_of_no_rows_is_a_matrix_of_none(base_isa):
    b = torch.randn(4, 5)
    for shape in ((0, 3, 5), (3, 0, 5)):
        x = torch.empty(shape)
        assert ProductCall(x, b, torch.empty(*shape[:2], 4), (False, True)).error() is None
        result = torch.full((5, 4), float("nan"))
        assert ProductCall(x, torch.empty(*shape[:2], 4), result, (True, False)).error() is None
        assert not result.any()


@each_dtype
@pytest.mark.parametrize("K", [150, 600])
def test_rows_that_fewer_others_surround_give_the_same_bits(isa, K, dtype, set_num_threads):
    a, b, bias = operands(300, 200, K, dtype, right=True)
    whole = product(a, b, bias, False, True)
    few = torch.cat([product(a[i : i + 4], b, bias, False, True) for i in range(0, 32, 4)])  # read where they lie
    for rows in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65):
        for threads in (1, 2):
            set_num_threads(threads)
            result = product(a[:rows], b, bias, False, True)
            ways = [x for x in (few, whole) if torch.equal(result, x[:rows])]  # which one, the number of rows decides
            assert ways
            assert torch.equal(product(a[:rows], b[:rows], bias[:rows], False, True), ways[0][:rows, :rows])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": torch.zeros(3, 7)}, r"left \(4, 6\) and right \(7, 3\) must fit each other"),
        ({"right": torch.zeros(3, 6, dtype=torch.float64)}, "right must be of dtype float32"),
        ({"bias": torch.zeros(4)}, "bias must have size 3"),
        ({"left": torch.zeros(4, 6, 2)}, "left must be a matrix"),
        ({"left": torch.zeros(4, 6, dtype=torch.int64)}, "must be float32, float64, bfloat16 or float16"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused_by_name(change, message):
    call = {"left": torch.zeros(4, 6), "right": torch.zeros(3, 6), "bias": torch.zeros(3)} | change
    with pytest.raises(RuntimeError, match=message):
        operator(call["left"], call["right"], call["bias"], False, True)

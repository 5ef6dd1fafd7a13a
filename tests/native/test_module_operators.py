"""The operators of a whole module: `multi_head_attention` and its gradient."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fused_mha.ops import module_autograd
from fused_mha.ops.module import GRADIENTS, TENSORS, Call
from native.call_space import DTYPES

OPS = torch.ops.fused_mha
KEEP = (True,)
CASES = {
    "self": {},
    "key is value": {"shared": 2, "S": 6},
    "three inputs, sequence first": {"shared": 1, "S": 6, "batch_first": False},
    "sizes of their own": {"shared": 1, "S": 6, "kdim": 5, "vdim": 7},
    "one size of their own": {"shared": 2, "S": 6, "kdim": 5, "vdim": 5},
    "unbatched, weights per head": {"batched": False, "padding": torch.bool, "average_attn_weights": False},
    "unbatched, averaged weights": {"batched": False, "padding": torch.float32, "shared": 1, "S": 3},
    "everything": {
        "batch_first": False,
        "padding": torch.bool,
        "attn_mask": True,
        "bias_kv": True,
        "add_zero_attn": True,
        "is_causal": True,
        "dropout_p": 0.3,
    },
    "no biases, no weights": {"bias": False, "need_weights": False},
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_call(
    dtype=torch.float32,
    N=2,
    L=4,
    S=4,
    E=8,
    H=2,
    kdim=None,
    vdim=None,
    batched=True,
    batch_first=True,
    shared=3,
    bias=True,
    bias_kv=False,
    padding=None,
    attn_mask=False,
    is_causal=False,
    add_zero_attn=False,
    dropout_p=0.0,
    need_weights=True,
    average_attn_weights=True,
    requires_grad=False,
):
    """The operator's arguments but for ``keep``."""

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    def sequence(length, size):
        if not batched:
            return draw(length, size)
        return draw(N, length, size) if batch_first else draw(length, N, size)

    query = sequence(L, E)
    is_packed = (kdim or E) == (vdim or E) == E
    key = None if shared == 3 else sequence(S, kdim or E)
    value = sequence(S, vdim or E) if shared == 1 else None if is_packed else key
    rows = (N, S) if batched else (S,)
    mask = None
    if padding is not None:
        mask = torch.zeros(rows, dtype=padding)
        mask[..., -1] = True if padding == torch.bool else -1.5
    return Call(
        query,
        key,
        value,
        draw(3 * E, E) if is_packed else None,
        *((None,) * 3 if is_packed else (draw(E, E), draw(E, kdim), draw(E, vdim))),
        draw(3 * E) if bias else None,
        draw(E, E),
        draw(E) if bias else None,
        draw(1, 1, E) if bias_kv else None,
        draw(1, 1, E) if bias_kv else None,
        torch.randn(N if batched else 1, 1, L, S).to(dtype) if attn_mask else None,
        mask,
        torch.tensor([5, 6]) if dropout_p else None,
        *(None, None),  # no packed sequences
        batch_first,
        H,
        is_causal,
        add_zero_attn,
        dropout_p,
        0.4,
        need_weights,
        average_attn_weights,
    )


def every_gradient(call):
    """The flags of all that may get a gradient."""
    return sum(1 << i for i in range(GRADIENTS) if call[i] is not None)


def backward_arguments(call):
    output, weights, *kept = OPS.multi_head_attention(*call, True)
    grad_weights = torch.randn_like(weights) if call.need_weights else None
    return (torch.randn_like(output), grad_weights, *kept, *call, every_gradient(call))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck of torch 2.14
@each_case
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(case, keep):
    torch.library.opcheck(
        OPS.multi_head_attention.default, (*make_call(requires_grad=keep, dtype=torch.float64, **case), keep)
    )


@each_case
def test_opcheck_of_the_gradient(case):
    arguments = backward_arguments(make_call(dtype=torch.float64, **case))
    torch.library.opcheck(OPS.multi_head_attention_backward.default, arguments)


@each_case
@each_dtype
def test_real_results_have_the_shapes_dtypes_and_strides_of_the_fake_ones(isa, case, dtype):
    call = make_call(dtype=dtype, **case)
    for operator, arguments in (
        (OPS.multi_head_attention, (*call, True)),
        (OPS.multi_head_attention, (*call, False)),
        (OPS.multi_head_attention_backward, backward_arguments(call)),
    ):
        meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        for real, fake in zip(operator(*arguments), operator(*meta), strict=True):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@each_case
def test_the_fallback_computes_the_same(base_isa, case):
    call = make_call(dtype=torch.float64, **case)
    for ours, fallback in zip(
        OPS.multi_head_attention(*call, True)[:2], module_autograd._fallback(*call, True)[:2], strict=True
    ):
        assert_close(ours, fallback)
    arguments = backward_arguments(call)
    for ours, fallback in zip(
        OPS.multi_head_attention_backward(*arguments), module_autograd._fallback_backward(*arguments), strict=True
    ):
        assert_close(ours, fallback)


@each_case
def test_what_is_kept_changes_no_bit(base_isa, case):
    call = make_call(**case)
    for kept, other in zip(
        OPS.multi_head_attention(*call, True)[:2], OPS.multi_head_attention(*call, False)[:2], strict=True
    ):
        assert torch.equal(kept, other)


@each_case
def test_each_gradient_is_the_same_alone(base_isa, case):
    *arguments, flags = backward_arguments(make_call(**case))
    together = OPS.multi_head_attention_backward(*arguments, flags)
    for i in range(GRADIENTS):
        alone = OPS.multi_head_attention_backward(*arguments, flags & 1 << i)
        for j, grad in enumerate(alone):
            assert torch.equal(grad, together[j]) if i == j else grad.numel() == 0


@pytest.mark.parametrize("L", [4, 150])  # a few rows, and many
def test_fp32_weights_beside_bf16_are_rounded_as_they_are_read(isa, L):
    call = make_call(dtype=torch.bfloat16, L=L, S=L, E=44)
    weights = {"in_weight": torch.randn(132, 44), "out_weight": torch.randn(44, 44)}
    rounded = {name: x.bfloat16() for name, x in weights.items()}
    for mixed, expected in zip(
        OPS.multi_head_attention(*call._replace(**weights), False)[:2],
        OPS.multi_head_attention(*call._replace(**rounded), False)[:2],
        strict=True,
    ):
        assert torch.equal(mixed, expected)


def test_strided_operands_are_read_right(base_isa):
    call = make_call(shared=1, S=6, bias_kv=True, padding=torch.float32, attn_mask=True)

    def strided(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    other = Call.of(strided(x) if isinstance(x, torch.Tensor) else x for x in call)
    for expected, found in zip(
        OPS.multi_head_attention(*call, True), OPS.multi_head_attention(*other, True), strict=True
    ):
        assert torch.equal(expected, found)
    grad_output, grad_weights, *kept, flags = *backward_arguments(call)[:5], every_gradient(call)
    expected = OPS.multi_head_attention_backward(grad_output, grad_weights, *kept, *call, flags)
    found = OPS.multi_head_attention_backward(strided(grad_output), strided(grad_weights), *kept, *other, flags)
    assert all(map(torch.equal, expected, found))


@each_case
def test_no_reference_to_a_tensor_is_left_behind(case):
    arguments = backward_arguments(make_call(**case))
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    before = [x._use_count() for x in tensors]
    OPS.multi_head_attention_backward(*arguments)
    OPS.multi_head_attention(*arguments[5:-1], True)
    with pytest.raises(RuntimeError, match="num_heads"):
        OPS.multi_head_attention(*Call.of(arguments[5:-1])._replace(num_heads=3), False)
    assert [x._use_count() for x in tensors] == before


def test_flops_are_those_of_the_products(base_isa):
    N, L, S, E, kdim, vdim = 2, 4, 6, 8, 5, 7
    call = make_call(shared=1, S=S, kdim=kdim, vdim=vdim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = OPS.multi_head_attention(*call, True)[0]
    projections = 2 * N * E * (2 * L * E + S * (kdim + vdim))
    assert counter.get_total_flops() == projections + 2 * N * L * S * 2 * E
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * projections + 2 * N * L * S * 5 * E


def test_flops_of_packed_sequences_are_those_of_each(base_isa):
    L, E, offsets = 7, 8, torch.tensor([0, 2, 2, 7])
    call = make_call(L=L, batched=False, need_weights=False, requires_grad=True)
    call = call._replace(cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    with FlopCounterMode(display=False) as counter:
        output = OPS.multi_head_attention(*call, True)[0]
    projections, scores = 8 * L * E * E, 2 * 2 + 5 * 5
    assert counter.get_total_flops() == projections + 2 * scores * 2 * E
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * projections + 2 * scores * 5 * E


class TestWrongCalls:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_heads": 3}, "num_heads"),
            ({"num_heads": 0}, "num_heads"),
            ({"num_heads": -2}, "num_heads"),
            ({"key": None}, "key may be absent"),
            ({"in_weight": None, "value": None}, "value may be absent"),
            ({"in_weight": None}, "in_weight"),
            ({"query": torch.zeros(2, 4, 10)}, "bias_k"),
            ({"query": torch.zeros(4, 8)}, "2-D or 3-D alike"),
            ({"query": torch.zeros(2, 1, 1, 4, 8)}, "four dimensions"),
            ({"query": torch.zeros(2, 0, 8)}, "empty"),
            ({"key": torch.zeros(2, 0, 8), "value": torch.zeros(2, 0, 8)}, "empty"),
            ({"key": torch.zeros(3, 6, 8)}, "key"),
            ({"value": torch.zeros(2, 5, 8)}, "value"),
            ({"value": torch.zeros(2, 6, 8, dtype=torch.float64)}, "value"),
            ({"in_weight": torch.zeros(24, 9)}, "weight"),
            ({"in_weight": torch.zeros(24, 8, dtype=torch.bfloat16)}, "weight"),
            ({"in_weight": torch.zeros(24)}, "weight"),
            ({"in_bias": torch.zeros(23)}, "bias"),
            ({"out_weight": torch.zeros(8, 9)}, "out_weight"),
            ({"out_weight": torch.zeros(6, 8)}, "weight"),
            ({"out_bias": torch.zeros(9)}, "out_bias"),
            ({"bias_k": torch.zeros(1, 1, 9)}, "bias_k"),
            ({"bias_k": torch.zeros(2, 1, 8)}, "bias_k"),
            ({"attn_mask": torch.zeros(2, 1, 4, 7)}, "attn_mask"),
            ({"attn_mask": torch.zeros(2, 1, 4, 6, dtype=torch.int32)}, "attn_mask"),
            ({"key_padding_mask": torch.zeros(2, 7)}, "key_padding_mask"),
            ({"key_padding_mask": torch.zeros(2, 6, dtype=torch.complex64)}, "key_padding_mask"),
            ({"dropout_p": 0.5}, "seed"),
            ({"dropout_p": -0.5}, "dropout_p"),
            ({"query": torch.zeros(2, 4, 8, dtype=torch.int64)}, "float32"),
            ({"query": torch.zeros(2, 4, 8, dtype=torch.complex64)}, "float32"),
        ],
        ids=lambda x: str(x)[:40],
    )
    def test_they_are_refused_by_name(self, change, message):
        call = make_call(shared=1, S=6, bias_kv=True)._replace(**change)
        with pytest.raises(RuntimeError, match=message):
            OPS.multi_head_attention(*call, True)

    def test_a_gradient_without_what_the_forward_keeps_is_refused(self):
        call = make_call()
        output, weights, *kept = OPS.multi_head_attention(*call, False)
        with pytest.raises(RuntimeError, match="kept nothing"):
            OPS.multi_head_attention_backward(output, weights, *kept, *call, every_gradient(call))

    @pytest.mark.parametrize("index", range(5))
    @pytest.mark.parametrize("wrong", ["smaller", "dtype"])
    def test_a_gradient_of_other_tensors_is_refused(self, index, wrong):
        arguments = list(backward_arguments(make_call()))
        x = arguments[index]
        arguments[index] = x.double() if wrong == "dtype" else x[..., :-1].contiguous()
        with pytest.raises(RuntimeError, match=r"\w"):
            OPS.multi_head_attention_backward(*arguments)


def test_the_tensors_come_first():
    assert Call._fields[TENSORS] == "batch_first"
    assert Call._fields[GRADIENTS] == "attn_mask"

"""The operators inside torch: opcheck, FLOP counts, checkpointing, and what they refuse when a graph calls them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_mha
from attention_oracle import make_arguments, run_with_gradients
from fused_mha import MultiHeadAttention
from fused_mha.ops.schema import TENSORS, Arguments
from native.call_space import DTYPES
from native.dense_oracle import drawn_seed, native_attention

OPS = torch.ops.fused_mha
CASES = {
    "plain": {},
    "bool masks and averaged weights": {"mask_dtype": torch.bool, "padding_dtype": torch.bool, "need_weights": True},
    "float masks": {"mask_dtype": torch.float32, "mask_shape": "HS", "padding_dtype": torch.float32},
    "weights per head": {"need_weights": True, "average_attn_weights": False, "bias_kv": True, "add_zero_attn": True},
    "weights of some heads": {"need_weights": True, "average_attn_weights": False, "weights_of_heads": (3, 0)},
    "dropout and a band": {"dropout_p": 0.4, "window": (1, 2)},
    "every tensor": {
        "mask_dtype": torch.float32,
        "padding_dtype": torch.float32,
        "bias_kv": True,
        "need_weights": True,
    },
    "no key": {"S": 0},
}


def operands(requires_grad=True, dtype=torch.float32, **case):
    """The arguments of the attention operator."""
    a = make_arguments(dtype=dtype, **case)
    p = a.get("dropout_p", 0.0)
    left, right = a.get("window") or (None, None)
    mask = a.get("attn_mask")
    arguments = Arguments(
        *(
            a["query"],
            a["key"],
            a["value"],
            None if mask is None else mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape),
        ),
        *(a.get("key_padding_mask"), a.get("bias_k"), a.get("bias_v"), torch.tensor([3, 4]) if p else None),
        *(a.get("sinks"), a.get("alibi_slopes"), None, None, None if left is None else -left, right, False),
        *(bool(a.get("add_zero_attn")), p, 0.5, a.get("softcap")),
        *(a.get("need_weights", False), a.get("average_attn_weights", True), a.get("weights_of_heads", ())),
    )
    for x in arguments[:TENSORS]:
        if x is not None and x.is_floating_point() and requires_grad:
            x.requires_grad_()
    return arguments


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck of torch 2.14
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_attention(case, dtype):
    torch.library.opcheck(OPS.attention.default, tuple(operands(dtype=dtype, **case)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "given", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_opcheck_of_attention_backward(case, given):
    arguments = operands(requires_grad=False, **case)
    output, weights, lse, stats = OPS.attention(*arguments)
    results = (output, weights if arguments.need_weights else None, lse)
    cotangents = [
        torch.randn_like(x) if wanted and x is not None else None for wanted, x in zip(given, results, strict=True)
    ]
    floating = [x is not None and x.is_floating_point() for x in (arguments.attn_mask, arguments.key_padding_mask)]
    torch.library.opcheck(OPS.attention_backward.default, (*cotangents, output, stats, *floating, *arguments))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_opcheck_of_dropout_mask(p):
    torch.library.opcheck(OPS.dropout_mask.default, (torch.tensor([1, 2]), (2, 3, 4, 19), p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_real_results_have_the_shapes_dtypes_and_strides_of_the_fake_ones(isa, case, dtype):
    arguments = operands(requires_grad=False, dtype=dtype, **case)
    meta = Arguments(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))
    for real, fake in zip(OPS.attention(*arguments), OPS.attention(*meta), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("wanted", [{}, {"need_weights": True}], ids=["output", "weights"])
def test_flops_are_those_of_two_products_forward_and_five_backward(wanted):
    N, L, S, H, D, D_v = 2, 7, 11, 4, 3, 5
    arguments = make_arguments(N=N, L=L, S=S, H=H, H_kv=2, D=D, D_v=D_v, **wanted)
    for name in ("query", "key", "value"):
        arguments[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        result = native_attention(**arguments)
    assert counter.get_total_flops() == 2 * N * H * L * S * (D + D_v)
    with FlopCounterMode(display=False) as counter:
        result.output.sum().backward()
    assert counter.get_total_flops() == 2 * N * H * L * S * (3 * D + 2 * D_v)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        native_attention(**arguments)
    assert counter.get_total_flops() == 2 * N * H * L * S * (D + D_v)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_activation_checkpointing_draws_the_same_dropout_again(base_isa, use_reentrant, need_weights):
    module = MultiHeadAttention(16, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 40, 16)

    def forward(leaf):
        return module(leaf, leaf, leaf, need_weights=need_weights)

    def results(call):
        torch.manual_seed(9)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        with fused_mha.backend("cpu"):
            outputs = [y for y in call(leaf) if y is not None]
            sum(y.square().sum() for y in outputs).backward()
        return [*(y.detach() for y in outputs), leaf.grad, *(parameter.grad for parameter in module.parameters())]

    plain = results(forward)
    recomputed = results(lambda leaf: checkpoint(forward, leaf, use_reentrant=use_reentrant))
    assert len(plain) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_saved_tensors_that_are_changed_in_place_are_noticed():
    arguments = make_arguments()
    leaf = arguments["query"].requires_grad_()
    output = native_attention(**arguments).output
    arguments["key"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), leaf)


def test_saved_tensors_can_be_packed_elsewhere():
    arguments = make_arguments(dropout_p=0.3, mask_dtype=torch.float32)
    with drawn_seed(1, 2):
        expected = run_with_gradients(native_attention, arguments)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone().numpy(), torch.from_numpy):
            packed = run_with_gradients(native_attention, arguments)
    assert all(torch.equal(packed[name], x) for name, x in expected.items())


class TestWrongOperands:
    """A graph that was exported with the operators calls them without the package's checks."""

    def everything(self):
        return operands(
            False, mask_dtype=torch.float32, mask_shape="NHLS", padding_dtype=torch.float32, bias_kv=True, dropout_p=0.5
        )

    @pytest.mark.parametrize("name", Arguments._fields[:8])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.complex64], ids=str)
    def test_a_foreign_dtype_is_refused_by_name(self, name, dtype):
        if (name, dtype) == ("seed", torch.int64):
            dtype = torch.int16
        arguments = self.everything()
        wrong = arguments._replace(**{name: getattr(arguments, name).to(dtype)})
        with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
            OPS.attention(*wrong)

    @pytest.mark.parametrize("name", Arguments._fields[:8])
    def test_more_dimensions_are_refused_by_name(self, name):
        arguments = self.everything()
        x = getattr(arguments, name)
        wrong = arguments._replace(**{name: x.reshape(*(1,) * (5 - x.dim()), *x.shape)})
        with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
            OPS.attention(*wrong)

    @pytest.mark.parametrize("name", Arguments._fields[1:8])
    def test_another_size_is_refused_by_name(self, name):
        arguments = self.everything()
        wrong = arguments._replace(**{name: torch.cat([getattr(arguments, name)] * 2)})
        with pytest.raises(RuntimeError, match=rf"^{name}\b"):
            OPS.attention(*wrong)

    @pytest.mark.parametrize("heads", [(4,), (0, -1), (2, 2), range(5)], ids=str)
    def test_the_weights_of_heads_that_are_not_there_are_refused_by_name(self, heads):
        arguments = self.everything()._replace(need_weights=True, average_attn_weights=False)
        with pytest.raises(RuntimeError, match=r"^weights_of_heads\b"):
            OPS.attention(*arguments._replace(weights_of_heads=heads))

    @pytest.mark.parametrize("index", range(5))
    def test_the_backward_refuses_another_size_by_name(self, index):
        arguments = self.everything()._replace(need_weights=True)
        output, weights, lse, stats = OPS.attention(*arguments)
        tensors = [torch.zeros_like(output), torch.zeros_like(weights), torch.zeros_like(lse), output, stats]
        tensors[index] = torch.cat([tensors[index]] * 2)
        name = ("grad_output", "grad_weights", "grad_lse", "output", "stats")[index]
        with pytest.raises(RuntimeError, match=rf"^{name}\b"):
            OPS.attention_backward(*tensors, True, True, *arguments)

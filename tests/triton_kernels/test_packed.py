"""Packed sequences by the Triton kernels under the interpreter: each as if it were alone, whatever the offsets hold."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_mha
from fused_mha.core import plans
from fused_mha.module import one_call
from fused_mha.ops import fallback
from native.dense_oracle import drawn_seed
from packed_calls import OPTIONS, cu_seqlens, one_by_one, packed_call, random_calls, varlen, with_gradients
from test_varlen import assert_is_attention_of_each

from search import examples

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from fused_mha.backends import triton as back_end
from fused_mha.backends.triton import launcher, packed

SEVERAL_TILES = ((70, 0, 1, 34), (35, 2, 0, 90))  # of 64 and 32 queries and 32 keys
SMALL = ((5, 0, 17), (7, 3, 0))
SUMMED = {"gradient of sinks", "gradient of alibi_slopes"}  # over the sequences
WRONG_OFFSETS = {
    "right": [0, 5, 5, 22],
    "behind the rows": [0, 5, 5, 99],
    "descending": [0, 20, 3, 22],
    "negative": [0, -7, 5, 22],
    "not from 0": [9, 12, 12, 22],
    "huge": [2**62, -(2**62), 2**63 - 1, -(2**63)],
}
ALL_OPTIONS = {"of_heads": ("sinks", "alibi_slopes"), "softcap": 2.0, "window": (20, 9), "padding_dtype": torch.float32}


def assert_has_the_bits_of_each_sequence(arguments):
    together, alone = with_gradients(varlen, arguments), with_gradients(one_by_one, arguments)
    for name in SUMMED & set(together):
        torch.testing.assert_close(together.pop(name), alone.pop(name), rtol=1e-4, atol=1e-3)
    for name, x in alone.items():
        assert torch.equal(together[name], x), name


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, ALL_OPTIONS | {"causal_alignment": "bottom_right"}],
    ids=["causal", "all options"],
)
def test_the_bits_are_those_of_each_sequence_alone(options, dtype):
    arguments = packed_call(SEVERAL_TILES, H=2, H_kv=1, dtype=dtype, **options)
    with fused_mha.backend("cpu"):
        assert_has_the_bits_of_each_sequence(arguments)


@pytest.mark.usefixtures("attention", "integers_are_checked")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_matches_the_oracle(options):
    assert_is_attention_of_each(packed_call(SMALL, H=2, H_kv=1, D=8, D_v=16, **options), "cpu", torch.float32)


@st.composite
def random_calls_of_any_layout(draw):
    arguments = draw(random_calls(most=4, dtypes=(torch.float32, torch.float16)))
    if draw(st.booleans()):  # heads before rows
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    return arguments


@settings(
    max_examples=examples(12),
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(arguments=random_calls_of_any_layout())
def test_any_call_is_that_of_each_sequence(attention, arguments):
    assert_is_attention_of_each(arguments, "cpu", arguments["query"].dtype)


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("of_heads", [(), ("sinks",)], ids=["plain", "sinks"])
def test_rows_behind_the_last_sequence_give_zeros_and_get_no_gradient(of_heads):
    arguments = packed_call(SMALL, H=2, H_kv=1, rest=4, of_heads=of_heads, is_causal=True)
    with fused_mha.backend("cpu"):
        results = with_gradients(varlen, arguments)
    for name in ("output", "gradient of query", "gradient of key", "gradient of value"):
        assert not results[name][-4:].any(), name
    expected = arguments["sinks"] if of_heads else torch.full((2,), -torch.inf)
    assert torch.equal(results["lse"][:, -4:], expected[:, None].expand(2, 4))


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize(
    ("lengths", "flags", "hidden"),
    [
        (((5, 3), (0, 4)), {}, 5),
        (((5, 3), (3, 4)), {"is_causal": True, "causal_alignment": "bottom_right"}, 2),
        (((5, 3), (5, 4)), {"key_padding_mask": torch.arange(9) < 3, "is_causal": True}, 3),
    ],
    ids=["no keys", "more queries than keys", "padding"],
)
def test_nan_that_comes_back_to_a_hidden_row_reaches_no_other(lengths, flags, hidden):
    arguments = packed_call(lengths, H=1, H_kv=1) | flags
    leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
    with fused_mha.backend("cpu"):
        output, lse = varlen(**arguments)
    loss = (output / output.norm(dim=-1, keepdim=True)).nan_to_num().sum() + torch.logaddexp(lse, lse).exp().sum()
    assert torch.autograd.grad(loss, output, retain_graph=True)[0][:hidden].isnan().all()
    assert torch.autograd.grad(loss, lse, retain_graph=True)[0][:, :hidden].isnan().all()
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.isfinite().all()


@pytest.mark.usefixtures("attention")
def test_a_sequence_drops_what_its_element_of_a_padded_batch_drops(attention):
    lengths = (5, 12, 1)
    rows = [torch.randn(sum(lengths), 2, 8, requires_grad=True) for _ in range(3)]
    padding = torch.arange(12) >= torch.tensor(lengths)[:, None]
    flags = {"is_causal": True, "dropout_p": 0.4, "return_lse": True}
    offsets = cu_seqlens(lengths)
    cotangent = torch.randn(sum(lengths), 2, 8)
    with drawn_seed(5, 6), fused_mha.backend("cpu"):
        result = fused_mha.varlen_attention(*rows, offsets, offsets, **flags)
    with drawn_seed(5, 6):
        padded = attention(
            **{name: fused_mha.unpack(x, padding) for name, x in zip(("query", "key", "value"), rows, strict=True)},
            key_padding_mask=padding,
            **flags,
        )
    expected = fused_mha.pack(padded.output, padding)[0]
    torch.testing.assert_close(result.output, expected)
    torch.testing.assert_close(result.lse, fused_mha.pack(padded.lse.transpose(1, 2), padding)[0].T)
    found, wanted = (torch.autograd.grad(x, rows, cotangent) for x in (result.output, expected))
    torch.testing.assert_close(found, wanted)


@triton.jit
def _places(cu_seqlens_q, cu_seqlens_k, N, L, S, virtual, result, BY_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    place = packed.place_of_program(cu_seqlens_q, cu_seqlens_k, N, L, S, virtual, BY_KEYS, BLOCK)
    at = result + tl.program_id(0) * 8
    tl.store(at, place.sequence)
    tl.store(at + 1, place.head)
    tl.store(at + 2, place.block)
    tl.store(at + 3, place.first_query)
    tl.store(at + 4, place.queries)
    tl.store(at + 5, place.first_key)
    tl.store(at + 6, place.keys)
    tl.store(at + 7, place.columns)


def places(offsets, L, S, virtual=0, by_keys=False, heads=1):
    """Of each program, in blocks of 16: its sequence, head, block, first query, queries, first key, keys, columns."""
    N = offsets[0].numel() - 1
    slots = packed.slots(S + (N + 1) * virtual if by_keys else L, N, 16)
    result = torch.empty(heads * slots, 8, dtype=torch.int64)
    _places[(heads * slots,)](*offsets, N, L, S, virtual, result, by_keys, 16)
    return result.tolist()


@pytest.mark.parametrize("virtual", [0, 2])
@pytest.mark.parametrize("by_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("of_queries", [[], [15], [0, 20, 20, 16, 0, 1, 47], [*range(4)] * 33], ids=len)
def test_every_row_of_every_head_is_of_one_program(of_queries, by_keys, virtual):
    lengths, rest = (of_queries, of_queries[::-1]), 5
    offsets, sequences = [cu_seqlens(of) for of in lengths], len(of_queries)
    L, S = (sum(of) + rest for of in lengths)
    found = []
    for n, h, block, first_query, queries, first_key, keys, columns in places(offsets, L, S, virtual, by_keys, heads=2):
        blocks = range(-(-(columns if by_keys else queries) // 16))
        if block in blocks:
            found.append((h, n, block))
            q, k = ([*of, rest][n] for of in lengths)
            assert (queries, keys) == (q, k)
            assert (first_query, first_key) == tuple(sum(of[:n]) for of in lengths)
            assert columns == (k + virtual if n < sequences else k)
        else:
            assert queries == keys == columns == 0
    rows = [x + virtual for x in lengths[1]] + [rest] if by_keys else [*lengths[0], rest]
    expected = [(h, n, block) for h in range(2) for n, size in enumerate(rows) for block in range(-(-size // 16))]
    assert sorted(found) == expected


@pytest.mark.parametrize("by_keys", [False, True], ids=["queries", "keys"])
def test_places_of_wrong_offsets_are_within_the_rows(by_keys):
    for of_queries, of_keys in itertools.product(WRONG_OFFSETS.values(), repeat=2):
        offsets = (torch.tensor(of_queries), torch.tensor(of_keys))
        for n, _, block, first_query, queries, first_key, keys, columns in places(offsets, 22, 22, 2, by_keys):
            assert 0 <= n <= 3
            assert block >= 0
            assert 0 <= first_query <= first_query + queries <= 22
            assert 0 <= first_key <= first_key + keys <= 22
            assert keys <= columns <= keys + 2


@triton.jit
def _sequences_of(slots, offsets, N, rows, result, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    tl.store(result + i, packed._sequence_of(tl.load(slots + i).to(tl.int32), offsets, N, rows, 0, BLOCK))


def test_the_search_finds_a_sequence_among_many():
    lengths = torch.randint(0, 3, (40_000,))
    offsets = cu_seqlens(lengths.tolist())
    first_slots = offsets // 16 + torch.arange(40_001)
    chosen = torch.tensor([0, 1, 127, 128, 129, 16_383, 16_384, 39_999, 40_000])
    found = torch.empty_like(chosen)
    _sequences_of[(len(chosen),)](first_slots[chosen], offsets, 40_000, int(offsets[-1]), found, 16)
    assert torch.equal(found, chosen)


@pytest.fixture
def accesses_are_inside(monkeypatch):
    """Every address that a kernel reads or writes is in a tensor that it was given."""
    ranges, run = [], launcher.run

    def spy(kernel, programs, how, call, *operands_and_tile):
        operands = (of if isinstance(of, tuple) else (of,) for of in operands_and_tile[:-1])
        given = [*call[: launcher.TENSORS], *itertools.chain.from_iterable(operands)]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + _extent(x)) for x in given if x is not None]
        return run(kernel, programs, how, call, *operands_and_tile)

    def check(pointers, mask):
        bits = pointers.get_element_ty().primitive_bitwidth
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses + bits // 8 <= end)
        assert inside.all()

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, *others):
        check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self, pointers, values, mask, *others):
        check(pointers, mask)
        return store(self, pointers, values, mask, *others)

    monkeypatch.setattr(launcher, "run", spy)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return ranges


def _extent(x):
    """How many bytes a tensor spans."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize(
    ("of_queries", "of_keys"),
    [
        *((offsets, offsets) for offsets in WRONG_OFFSETS.values()),
        *((WRONG_OFFSETS["right"], offsets) for offsets in WRONG_OFFSETS.values()),
        *((offsets, WRONG_OFFSETS["right"]) for offsets in WRONG_OFFSETS.values()),
    ],
)
def test_wrong_offsets_reach_no_memory_of_others(accesses_are_inside, of_queries, of_keys):
    arguments = packed_call(((5, 0, 17), (5, 0, 17)), H=1, H_kv=1, D=16, D_v=16, **ALL_OPTIONS)
    arguments |= {"cu_seqlens_q": torch.tensor(of_queries), "cu_seqlens_k": torch.tensor(of_keys)}
    with fused_mha.backend("cpu"):
        with_gradients(varlen, arguments)
    assert accesses_are_inside


def _gradients(output, inputs, parameters):
    """Those of the inputs, and a list of those of the parameters."""
    found = torch.autograd.grad(output.sin().sum(), [*inputs, *parameters])
    return *found[: len(inputs)], [*found[len(inputs) :]]


@pytest.mark.usefixtures("as_on_a_gpu")
class TestEagerCalls:
    def test_a_packed_call_takes_no_plan_of_a_padded_one(self):
        query, key, value = (torch.randn(12, 2, 8) for _ in range(3))
        offsets = torch.tensor([0, 5, 12])
        batch = {"query": query[None], "key": key[None], "value": value[None]}
        for _ in range(2):
            padded = fused_mha.attention(**batch).output[0]
            found = fused_mha.varlen_attention(query, key, value, offsets, offsets).output
        assert len(plans._kept) == 2
        torch.testing.assert_close(found, one_by_one(query, key, value, offsets, offsets)[0])
        assert not torch.allclose(found, padded)

    def test_offsets_of_other_values_take_the_same_plan(self):
        arguments = packed_call(((5, 7), (3, 9)), H=2, H_kv=1, of_heads=("sinks",))
        for ends in ((0, 5, 12), (0, 12, 12), (0, 1, 9)):
            arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = torch.tensor(ends)
            last = ends[-1]
            within = {name: arguments[name][:last] for name in ("query", "key", "value")}
            expected = one_by_one(**arguments | within)[0]
            assert torch.equal(varlen(**arguments)[0][:last], expected)
        kinds = [kind for kind in plans._kept if any(type(x) is tuple and x[0] == (3,) for x in kind)]
        assert len(kinds) == 1

    def test_what_other_back_ends_serve_is_kept_with_its_offsets(self):
        arguments = packed_call(SMALL, H=2, H_kv=1, **ALL_OPTIONS)
        with fused_mha.backend("reference"):
            first, again = (varlen(**arguments)[0] for _ in range(2))
        assert len(plans._kept) == 1
        assert torch.equal(first, again)
        torch.testing.assert_close(first, one_by_one(**arguments)[0])

    def test_other_numbers_of_sequences_and_flags_take_others(self, launches):
        query = torch.randn(12, 2, 8)
        flags = [{}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "bottom_right"}, {"dropout_p": 0.5}]
        for count, (ends, given_flags) in enumerate(itertools.product(([0, 12], [0, 5, 12]), flags), 1):
            offsets = torch.tensor(ends)
            fused_mha.varlen_attention(query, query, query, offsets, offsets, **given_flags)
            assert len(plans._kept) == count

    def test_gradients_are_those_of_the_general_way(self, monkeypatch):
        arguments = packed_call(SMALL, H=2, H_kv=1, dropout_p=0.3, **{**ALL_OPTIONS, "padding_dtype": torch.bool})
        with drawn_seed(5, 6):
            varlen(**arguments)
            found = with_gradients(varlen, arguments)
            assert len(plans._kept) == 1
            monkeypatch.setattr(plans, "DEVICE", "cuda")
            expected = with_gradients(varlen, arguments)
        for name, x in expected.items():
            assert torch.equal(found[name], x), name

    def test_the_host_reads_no_tensor(self, launches, monkeypatch):
        arguments = packed_call(SMALL, H=2, H_kv=1, dropout_p=0.3, **{**ALL_OPTIONS, "padding_dtype": torch.bool})
        leaf = arguments["query"].requires_grad_()

        def read(*_):
            raise AssertionError("read")

        for name in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, read)
        for _ in range(2):
            output, _ = varlen(**arguments)
            torch.autograd.grad(output, leaf, torch.ones_like(output))
        assert len(launches.by_triton) == 6

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    def test_nested_input_of_a_module_with_virtual_keys(self, monkeypatch, layout):
        monkeypatch.setattr(one_call, "forward", lambda *_, **__: None)  # of the CPU
        module = fused_mha.MultiHeadAttention(16, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        lengths = ((5, 18, 1, 33), (18, 18, 0, 33))  # of queries and keys
        rows = [[torch.randn(length, 16) for length in of] for of in lengths]
        x, y = inputs = [torch.nested.nested_tensor(of, layout=layout, requires_grad=True) for of in rows]
        output, _ = module(x, y, y, need_weights=False, is_causal=True)
        found = torch.cat(output.unbind())
        alone = [[row.clone().requires_grad_() for row in of] for of in rows]
        pairs = zip(*alone, strict=True)
        expected = torch.cat([module(a, b, b, need_weights=False, is_causal=True)[0] for a, b in pairs])
        torch.testing.assert_close(found, expected)
        parameters = [*module.parameters()]
        *of_inputs, of_parameters = _gradients(found, inputs, parameters)
        *of_rows, of_parameters_alone = _gradients(expected, [row for of in alone for row in of], parameters)
        torch.testing.assert_close([row for grad in of_inputs for row in grad.unbind()], of_rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_parameters, of_parameters_alone, rtol=1e-4, atol=1e-5)


def test_a_call_on_a_gpu_goes_to_these_kernels_and_is_traced_by_shapes():
    with FakeTensorMode():
        query = torch.empty(9, 4, 16, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.empty(7, 2, size, device="cuda", dtype=torch.bfloat16) for size in (16, 24))
        offsets = torch.empty(3, device="cuda", dtype=torch.int32)
        output, _, lse = fused_mha.varlen_attention(query, key, value, offsets, offsets, return_lse=True)
    assert (output.shape, output.dtype, output.device.type) == ((9, 4, 24), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((4, 9), torch.float32)


@pytest.mark.parametrize("case", [{"dtype": torch.float64}, {"D": 300}, {"lengths": ((2, 3), (0, 0))}], ids=str)
def test_an_exported_graph_runs_also_with_what_the_kernels_cannot_do(case):
    arguments = packed_call(**{"lengths": ((2, 3), (4, 1)), "H": 2, "H_kv": 1} | case)
    tensors = [arguments[name] for name in ("query", "key", "value")]
    offsets = [arguments[name].long() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    inputs = (*(x[None] for x in tensors), *[None] * 7, *offsets)
    inputs += (None, None, False, False, 0.0, 0.3, None, False, True, None)
    for found, expected in zip(back_end._attention(*inputs), fallback.attention(*inputs), strict=True):
        assert torch.equal(found, expected)

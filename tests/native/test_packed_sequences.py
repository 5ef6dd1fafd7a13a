"""Packed sequences in the C++ core: the bits of each sequence alone, with any number of threads, and the offsets that
the C functions refuse.
"""

import pytest
import torch

import fused_mha
from native.c_abi import Call, assert_refused
from native.test_determinism import assert_same_bits
from packed_calls import OPTIONS, one_by_one, packed_call, varlen, with_gradients

# Few keys, one query, several chunks of keys in the backward, several pieces of a sequence, and none at all.
LENGTHS = ((5, 0, 1, 1, 40, 300, 3, 0), (7, 3, 0, 1, 600, 560, 530, 0))
SUMMED = {"gradient of sinks", "gradient of alibi_slopes"}  # over the sequences


def assert_has_the_bits_of_each_sequence(arguments):
    packed, alone = with_gradients(varlen, arguments), with_gradients(one_by_one, arguments)
    for name in SUMMED & set(packed):
        torch.testing.assert_close(packed.pop(name), alone.pop(name), rtol=1e-4, atol=1e-3)
    for name, x in alone.items():  # autograd adds those of each sequence to zeros, and so makes 0 of -0
        assert torch.equal(packed[name], x), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_bits_are_those_of_each_sequence_alone(isa, options, dtype, set_num_threads):
    set_num_threads(1)
    arguments = packed_call(LENGTHS, D=32, dtype=dtype, **options)
    assert_has_the_bits_of_each_sequence(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_threads_gives_the_same_bits(isa, dtype, set_num_threads):
    arguments = packed_call(LENGTHS, D=32, dtype=dtype, is_causal=True, of_heads=("sinks", "alibi_slopes"))
    set_num_threads(1)
    alone = with_gradients(varlen, arguments)
    for threads in (2, 3, 8):
        set_num_threads(threads)
        assert_same_bits(with_gradients(varlen, arguments), alone)


def test_a_hundred_thousand_short_sequences(base_isa):
    lengths = torch.randint(0, 4, (100_000,)).tolist()
    arguments = packed_call((lengths, lengths), H=1, H_kv=1, D=4, D_v=4, is_causal=True)
    output, _ = varlen(**arguments)
    ends = arguments["cu_seqlens_q"]
    for n in (0, 1, 49_999, 99_998, 99_999):
        rows = [arguments[name][None, ends[n] : ends[n + 1]] for name in ("query", "key", "value")]
        assert torch.equal(output[ends[n] : ends[n + 1]], fused_mha.attention(*rows, is_causal=True).output[0])


def packed(function, queries, keys):
    """A call of the C function whose one batch element is of packed sequences."""
    call = Call(function)
    call.arguments.attention.add_zero_attn = 0
    absent = (
        "attn_mask",
        "bias_k",
        "bias_v",
        "weights",
        "grad_weights",
        "grad_attn_mask",
        "grad_bias_k",
        "grad_bias_v",
    )
    for name in absent:
        if name in call.tensors:
            call.fields(name).data = None
    for name, x in call.tensors.items():
        if name in absent or name in ("seed", "sinks", "alibi_slopes", "workspace"):
            continue
        call.tensors[name] = x[:, :1] if name == "stats" else x[:1]
    call.tensors |= {"cu_seqlens_q": torch.tensor(queries), "cu_seqlens_k": torch.tensor(keys)}
    if "grad_sinks" in call.tensors:
        call.tensors["grad_sinks"] = torch.zeros(len(queries), 4)
    for name, x in call.tensors.items():
        if name not in absent and name != "workspace":
            call.fields(name).fill(x)
    call.tensors["workspace"] = torch.empty(max(call.workspace(), 0), dtype=torch.uint8)
    call.fields("workspace").fill(call.tensors["workspace"])
    return call


each_function = pytest.mark.parametrize("function", ["forward", "backward"])


@each_function
def test_the_call_itself_is_served(base_isa, function):
    assert packed(function, [0, 1, 3], [0, 3, 5]).error() is None


@each_function
@pytest.mark.parametrize(
    ("queries", "keys", "name"),
    [
        ([1, 3], [0, 5], "cu_seqlens_q"),
        ([0, 4], [0, 5], "cu_seqlens_q"),
        ([0, 3], [0, 6], "cu_seqlens_k"),
        ([0, 3, 2], [0, 5, 5], "cu_seqlens_q"),
        ([0, 3, 3], [0, -1, 5], "cu_seqlens_k"),
        ([0, 3], [0, 5, 5], "cu_seqlens_k"),
        ([0, 2**62], [0, 5], "cu_seqlens_q"),
    ],
)
def test_offsets_outside_the_rows_are_refused(function, queries, keys, name):
    assert_refused(packed(function, queries, keys), name)


@each_function
@pytest.mark.parametrize("change", ["dtype", "size", "bytes", "stride", "missing"])
def test_a_wrong_tensor_of_offsets_is_refused(function, change):
    call = packed(function, [0, 1, 3], [0, 3, 5])
    fields = call.fields("cu_seqlens_k")
    if change == "dtype":
        fields.dtype = 0
    elif change == "size":
        fields.size[0] = 2
    elif change == "bytes":
        fields.bytes = 23
    elif change == "stride":
        fields.stride[0] = 2
    else:
        fields.data = None
    assert_refused(call, "cu_seqlens_k")


@each_function
def test_what_packed_sequences_cannot_have_is_refused(function):
    call = packed(function, [0, 1, 3], [0, 3, 5])
    call.fields("attn_mask").fill(torch.zeros(1, 4, 3, 5))
    assert_refused(call, "packed")
    call = packed(function, [0, 1, 2], [0, 3, 5])
    call.arguments.attention.add_zero_attn = 1
    assert_refused(call, "beside")


def test_the_library_is_asked_for_the_workspace_of_all_sequences():
    one, many = (
        packed("backward", offsets, [0, *[5] * (len(offsets) - 1)]).workspace() for offsets in ([0, 3], [0, *[3] * 50])
    )
    assert 0 < one < many

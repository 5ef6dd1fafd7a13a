"""What the C functions refuse: every tensor is checked against the call, by name, before a kernel sees its pointer."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_mha.backends.cpu import LIBRARY
from native.c_abi import DTYPES, RESULTS, SHARED, C, Call, TensorFields, assert_refused

OPTIONAL = {"attn_mask", "key_padding_mask", "weights", "lse", "grad_weights", "grad_lse", "grad_attn_mask"}
OPTIONAL |= {"grad_columns", "grad_bias_k", "grad_bias_v", "grad_sinks", "grad_distances"}
OPTIONAL |= {"sinks", "alibi_slopes"}  # absent where there is no pointer
DEPENDENT = ("key", "value", "output", "attn_mask", "key_padding_mask", "bias_k", "bias_v", "stats")
OFFSETS = {"cu_seqlens_q", "cu_seqlens_k"}  # of packed sequences: test_packed_sequences has those
EACH = [(function, name) for function in RESULTS for name in (*SHARED, *RESULTS[function]) if name not in OFFSETS]

each_argument = pytest.mark.parametrize(("function", "name"), EACH)
each_function = pytest.mark.parametrize("function", RESULTS)


def rank(call, name):
    return call.tensors[name].dim()


@each_function
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_the_call_itself_is_served(isa, function, dtype):
    assert Call(function, dtype).error() is None


@each_argument
def test_a_wrong_dtype_is_refused(function, name):
    for code in (1, 5, 6, 7, 64, -1, 2**40, -(2**63)):
        call = Call(function)
        fields = call.fields(name)
        if code == fields.dtype or (code == 1 and name in ("attn_mask", "key_padding_mask")):
            continue  # a mask may be of any floating dtype
        fields.dtype = code
        # query's dtype, if it is floating, is the measure of the others
        assert_refused(call, "key" if name == "query" and code == 1 else name, name)


@each_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_fp32_tensor_beside_another_dtype_is_refused(function, dtype):
    for name in ("key", "value", "bias_k", "bias_v", "output", *(("weights",) if function == "forward" else ())):
        call = Call(function, dtype)
        call.tensors[name] = torch.zeros(call.tensors[name].shape)
        call.fields(name).fill(call.tensors[name])
        assert_refused(call, name)


@each_argument
def test_a_larger_size_than_its_storage_or_the_call_is_refused(function, name):
    for dimension in range(4):
        call = Call(function)
        call.fields(name).size[dimension] += 1
        assert_refused(call, name)


@each_argument
def test_a_larger_size_within_its_storage_is_refused(function, name):
    for dimension in range(rank(Call(function), name)):
        call = Call(function)
        fields = call.fields(name)
        fields.bytes *= 4
        fields.size[dimension] += 1
        if name in ("workspace", "weights_of_heads"):
            continue  # the elements of the latter are read
        # query, key and value say what the others must be
        assert_refused(call, name, *(DEPENDENT if name in SHARED[:3] else ()))


@each_argument
def test_a_smaller_size_than_the_calls_is_refused(function, name):
    for dimension in range(rank(Call(function), name)):
        call = Call(function)
        fields = call.fields(name)
        fields.size[dimension] -= 1
        if name in ("attn_mask", "grad_attn_mask") and fields.size[dimension] == 1 and dimension < 3:
            continue  # it broadcasts
        dependent = ("weights", "grad_weights") if name == "weights_of_heads" else DEPENDENT
        assert_refused(call, name, *(dependent if name in (*SHARED[:3], "weights_of_heads") else ()))


@each_argument
@pytest.mark.parametrize("size", [-1, -(2**62), 2**62, 2**63 - 1], ids=["-1", "-2^62", "2^62", "2^63-1"])
def test_a_negative_or_overflowing_size_is_refused(function, name, size):
    for dimension in range(4):
        call = Call(function)
        call.fields(name).size[dimension] = size
        assert_refused(call, name)


@each_argument
@pytest.mark.parametrize("stride", [-1, 2**62, 2**63 - 1, -(2**63)], ids=["-1", "2^62", "2^63-1", "-2^63"])
def test_a_negative_or_overflowing_stride_is_refused(function, name, stride):
    for dimension in range(rank(Call(function), name)):
        call = Call(function)
        call.fields(name).stride[dimension] = stride
        assert_refused(call, name)


@each_argument
def test_a_last_dimension_with_gaps_is_refused(function, name):
    call = Call(function)
    fields = call.fields(name)
    fields.bytes *= 4
    fields.stride[rank(call, name) - 1] = 2
    if name == "key_padding_mask":  # the one that is read element by element
        call.tensors[name] = torch.zeros(2, 20)
        fields.data, fields.bytes = call.tensors[name].data_ptr(), 160
        assert call.error() is None
    else:
        assert_refused(call, name)


@each_argument
def test_a_storage_that_is_one_byte_too_small_is_refused(function, name):
    call = Call(function)
    call.fields(name).bytes -= 1
    assert_refused(call, name)


@each_argument
def test_a_missing_tensor_is_refused_or_left_out(function, name):
    call = Call(function)
    call.fields(name).data = None
    if function == "backward" and name in ("sinks", "alibi_slopes"):
        assert_refused(call, "grad_sinks and grad_distances")
        return
    if name in OPTIONAL:  # without the weights a call works otherwise, and needs another workspace
        call.tensors["workspace"] = torch.empty(call.workspace(), dtype=torch.uint8)
        call.fields("workspace").fill(call.tensors["workspace"])
    if name in OPTIONAL or (function, name) == ("forward", "stats"):
        assert call.error() is None
    elif name in ("bias_k", "bias_v"):  # the weights have a column for them
        assert_refused(call, "bias_k", "bias_v")
    elif name == "weights_of_heads":  # then they are of all heads
        assert_refused(call, "weights", "grad_weights")
    else:
        assert_refused(call, name)


@each_function
def test_both_biases_left_out_change_the_width_of_the_weights(function):
    call = Call(function)
    for name in ("bias_k", "bias_v"):
        call.fields(name).data = None
    assert_refused(call, "weights", "grad_weights")


@each_function
def test_a_workspace_of_another_call_is_refused(function):
    call = Call(function)
    for size in (0, 1, call.tensors["workspace"].numel() - 1):
        call.tensors["workspace"] = torch.empty(size, dtype=torch.uint8)
        call.fields("workspace").fill(call.tensors["workspace"])
        assert_refused(call, "workspace")


@each_function
@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_dropout_probability_outside_zero_and_one_is_refused(function, dropout_p):
    call = Call(function)
    call.arguments.attention.dropout_p = dropout_p
    assert_refused(call, "dropout_p")


@each_function
@pytest.mark.parametrize("side", ["first_visible", "last_visible"])
@pytest.mark.parametrize("far", [2**62, -(2**62), 2**63 - 1, -(2**63)])
def test_a_band_that_would_overflow_is_refused(function, side, far):
    call = Call(function)
    setattr(call.arguments.attention, side, far)
    assert_refused(call, "first_visible", "last_visible")


@each_function
@pytest.mark.parametrize("heads", [(0, 4, 1), (-1, 0, 1), (0, 1, 2**62), (2, 0, 2), (-(2**63), 1, 2)], ids=str)
def test_heads_that_are_not_there_or_come_twice_are_refused(function, heads):
    call = Call(function)
    call.tensors["weights_of_heads"].copy_(torch.tensor(heads))
    assert_refused(call, "weights_of_heads")


@each_function
def test_the_weights_of_no_head_of_too_many_or_averaged_ones_are_refused(function):
    for count in (0, 5):
        call = Call(function)
        call.tensors["weights_of_heads"] = torch.tensor([0, 1, 2, 3, 0])
        call.fields("weights_of_heads").fill(call.tensors["weights_of_heads"])
        call.fields("weights_of_heads").size[0] = count
        assert_refused(call, "weights_of_heads")
    call = Call(function)
    call.arguments.attention.average_weights = 1
    assert_refused(call, "weights_of_heads")


@each_function
@pytest.mark.parametrize("threads", [0, -1, -(2**63)])
def test_an_impossible_number_of_threads_is_refused(function, threads):
    call = Call(function)
    call.arguments.attention.threads = threads
    assert_refused(call, "threads")


@each_function
def test_heads_that_are_no_multiple_of_the_keys_are_refused(function):
    for heads in (3, 1):
        call = Call(function)
        call.fields("query").size[2] = heads
        assert "heads" in call.error()


def test_sizes_whose_product_overflows_are_refused():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    script = [sys.executable, str(Path(__file__).with_name("overflowing_calls.py"))]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [line.split() for line in done.stdout.splitlines()]
    assert len(cases) == 6
    for name, least, needed in cases:
        assert int(needed) < 0 or int(needed) >= int(least), name


def dropout_mask(seed, mask, p=0.5):
    status = C.fused_mha_dropout_mask(ctypes.byref(seed), ctypes.byref(mask), ctypes.c_double(p), ctypes.c_int64(1))
    return None if status == 0 else C.fused_mha_last_error().decode()


class TestDropoutMask:
    def fields(self):
        self.tensors = torch.tensor([1, 2]), torch.zeros(1, 2, 3, 4, dtype=torch.bool)
        result = TensorFields(), TensorFields()
        for fields, x in zip(result, self.tensors, strict=True):
            fields.fill(x)
        return result

    def test_the_call_itself_is_served(self):
        assert dropout_mask(*self.fields()) is None

    @pytest.mark.parametrize("which", [0, 1], ids=["seed", "mask"])
    def test_a_wrong_tensor_is_refused(self, which):
        name = ("seed", "mask")[which]
        last = (0, 3)[which]
        changes = [("dtype", 0), ("dtype", 99), ("bytes", self.fields()[which].bytes - 1), ("data", None)]
        for attribute, value in changes:
            fields = self.fields()
            setattr(fields[which], attribute, value)
            assert dropout_mask(*fields).split()[0] == name
        for attribute, value in (("size", 5), ("size", -4), ("size", 2**62), ("stride", 2), ("stride", -1)):
            fields = self.fields()
            getattr(fields[which], attribute)[last] = value
            assert dropout_mask(*fields).split()[0] == name

    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_a_wrong_probability_is_refused(self, p):
        assert dropout_mask(*self.fields(), p).split()[0] == "dropout_p"

    def test_a_strided_seed_is_read_right_or_refused(self):
        seed = torch.tensor([1, 7, 2, 7])[::2]
        expected = torch.ops.fused_mha.dropout_mask(seed.clone(), (1, 2, 3, 40), 0.5)
        try:
            mask = torch.ops.fused_mha.dropout_mask(seed, (1, 2, 3, 40), 0.5)
        except RuntimeError as error:
            assert str(error).startswith("seed")  # noqa: PT017
        else:
            assert torch.equal(mask, expected)


def test_exp2_of_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match="float32 or float64"):
        LIBRARY.exp2(torch.zeros(3, dtype=torch.float16))

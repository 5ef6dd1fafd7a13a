"""What `fused_mha_module` and `fused_mha_product` refuse: every tensor is checked before a kernel sees its pointer."""

import pytest
import torch

from native.c_abi import assert_refused
from native.module_call import KEPT, SHARED, ModuleCall, ProductCall

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHTS = ("query_weight", "key_weight", "value_weight", "out_weight")
BIASES = ("query_bias", "key_bias", "value_bias", "out_bias")
INPUTS = ("query", "key", "value")
OPTIONAL = {"attn_mask", "key_padding_mask", "weights", "lse", "stats", *BIASES}
EACH = (*INPUTS, *WEIGHTS, *BIASES, "output", *KEPT, *SHARED, "weights", "lse")

each_argument = pytest.mark.parametrize("name", EACH)
keeps_or_not = pytest.mark.parametrize("keeps", [True, False], ids=["kept", "not kept"])


def calls(name):
    """With and without what is kept for the backward, if the argument is of both."""
    return [ModuleCall(keeps=keeps) for keeps in (True, False) if keeps or (name not in KEPT and name != "stats")]


@keeps_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_call_itself_is_served(isa, keeps, dtype):
    call = ModuleCall(keeps=keeps, dtype=dtype)
    assert call.error() is None
    for name in ("output", "weights", "lse", *(("stats", *KEPT) if keeps else ())):
        assert not call.tensors[name].isnan().any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_changes_no_bit(isa, dtype):
    one, other = (ModuleCall(keeps=keeps, dtype=dtype) for keeps in (True, False))
    assert one.error() is other.error() is None
    for name in ("output", "weights", "lse"):
        assert torch.equal(one.tensors[name], other.tensors[name])


@each_argument
def test_a_storage_that_is_one_byte_too_small_is_refused(name):
    for call in calls(name):
        call.fields(name).bytes -= 1
        assert_refused(call, name)


@each_argument
def test_a_wrong_dtype_is_refused(name):
    for code in (1, 3, 5, 6, 7, 64, -1, 2**40, -(2**63)):
        for call in calls(name):
            fields = call.fields(name)
            if code == fields.dtype or (code in (1, 3) and name in ("attn_mask", "key_padding_mask", "query")):
                continue
            fields.dtype = code
            assert_refused(call, name)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_query_of_another_dtype_than_the_rest_is_refused(code):
    for call in calls("query"):
        call.fields("query").dtype = code
        assert_refused(call)


@each_argument
@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("has_room", [True, False])
def test_another_size_is_refused(name, change, has_room):
    for dimension in range(4):
        for call in calls(name):
            fields = call.fields(name)
            if has_room:
                fields.bytes *= 4
                if name == "workspace" and change == 1:
                    continue
            fields.size[dimension] += change
            broadcasts = name == "attn_mask" and fields.size[dimension] == 1 and dimension < 3
            if not broadcasts:
                assert_refused(call)


@each_argument
@pytest.mark.parametrize("size", [-1, -(2**62), -(2**63), 2**31, 2**45, 2**62, 2**63 - 1])
def test_a_negative_or_overflowing_size_is_refused(name, size):
    for dimension in range(4):
        for call in calls(name):
            call.fields(name).size[dimension] = size
            assert_refused(call)
            assert call.workspace() < 0 or name == "workspace"


@each_argument
@pytest.mark.parametrize("stride", [-1, 2**62, 2**63 - 1, -(2**63)])
def test_a_negative_or_overflowing_stride_is_refused(name, stride):
    for call in calls(name):
        for dimension in range(call.tensors[name].dim()):
            fresh = ModuleCall(keeps="heads" in call.tensors)
            fresh.fields(name).stride[dimension] = stride
            assert_refused(fresh, name)


@each_argument
def test_a_last_dimension_with_gaps_is_refused(name):
    for call in calls(name):
        fields = call.fields(name)
        fields.bytes *= 4
        fields.stride[call.tensors[name].dim() - 1] = 2
        if name != "key_padding_mask":  # the one that is read element by element
            assert_refused(call, name)


@each_argument
def test_a_missing_tensor_is_refused_or_left_out(name):
    for call in calls(name):
        call.fields(name).data = None
        if name in OPTIONAL:
            call.allocate_workspace()
            assert call.error() is None
        elif name in ("key", "value"):  # query or key take its place, of another size
            assert_refused(call, "value", "value_weight")
        elif name == "projected query":  # then nothing is kept
            continue
        else:
            assert_refused(call)


@pytest.mark.parametrize("name", KEPT)
def test_heads_that_do_not_lie_side_by_side_are_refused(name):
    call = ModuleCall()
    fields = call.fields(name)
    fields.bytes *= 8
    fields.stride[2] += 1
    assert_refused(call, name)


@keeps_or_not
def test_a_workspace_of_another_call_is_refused(keeps):
    for change in (0, 1, -1):
        call = ModuleCall(keeps=keeps)
        size = change if change >= 0 else call.tensors["workspace"].numel() - 1
        call.tensors["workspace"] = torch.empty(size, dtype=torch.uint8)
        call.fields("workspace").fill(call.tensors["workspace"])
        assert_refused(call, "workspace")


@pytest.mark.parametrize("num_heads", [0, -1, 5, 13, 2**62, 2**63 - 1, -(2**63)])
def test_heads_that_do_not_divide_the_projection_are_refused(num_heads):
    call = ModuleCall(keeps=False)
    call.arguments.num_heads = num_heads
    assert_refused(call)


def test_kept_heads_of_another_number_are_refused():
    for name, heads in (("projected query", 3), ("projected key", 3), ("projected value", 1), ("heads", 2)):
        call = ModuleCall()
        call.fields(name).size[2] = heads
        assert_refused(call)


@keeps_or_not
@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_dropout_probability_outside_zero_and_one_is_refused(keeps, dropout_p):
    call = ModuleCall(keeps=keeps)
    call.arguments.core.attention.dropout_p = dropout_p
    assert_refused(call, "dropout_p")


@pytest.mark.parametrize("threads", [0, -1, -(2**63), 2**62])
def test_an_impossible_number_of_threads_is_refused(threads):
    call = ModuleCall()
    call.arguments.core.attention.threads = threads
    assert_refused(call, "threads")


@pytest.mark.parametrize("side", ["first_visible", "last_visible"])
@pytest.mark.parametrize("far", [2**62, -(2**62), 2**63 - 1, -(2**63)])
def test_a_band_that_would_overflow_is_refused(side, far):
    call = ModuleCall()
    setattr(call.arguments.core.attention, side, far)
    assert_refused(call, "first_visible", "last_visible")


def of_one_input(*names, keeps=False, **changes):
    """A call of packed weights: without key, value and their weights."""
    call = ModuleCall(keeps=keeps, kdim=7, vdim=7, H_kv=4, D_v=3, S=3)
    packed = {f"query_{part}": torch.cat([call.tensors[f"{x}_{part}"] for x in INPUTS]) for part in ("weight", "bias")}
    for name in ("key", "value", "key_weight", "value_weight", "key_bias", "value_bias"):
        call.fields(name).data = None
    for name, x in packed.items():
        call.tensors[name] = x
        call.fields(name).fill(x)
    return call


@keeps_or_not
def test_packed_weights_give_what_three_give(base_isa, keeps):
    packed, apart = of_one_input(keeps=keeps), ModuleCall(keeps=keeps, kdim=7, vdim=7, H_kv=4, D_v=3, S=3)
    for name in ("key", "value"):
        apart.tensors[name] = apart.tensors["query"]
        apart.fields(name).fill(apart.tensors["query"])
    packed.allocate_workspace()
    assert packed.error() is apart.error() is None
    for name in ("output", "weights", "lse", *(KEPT if keeps else ())):
        assert torch.equal(packed.tensors[name], apart.tensors[name]), name


@keeps_or_not
@pytest.mark.parametrize("name", ["query_weight", "query_bias"])
def test_packed_weights_that_are_too_short_are_refused(keeps, name):
    for change in ("bytes", "rows", "one row"):
        call = of_one_input(keeps=keeps)
        fields = call.fields(name)
        if change == "bytes":
            fields.bytes -= 1
        else:
            fields.size[0] -= 3 if change == "rows" else 1
        assert_refused(call)


@pytest.mark.parametrize("size", [2**31, 2**45, 2**62, 2**63 - 1, -(2**63)])
def test_weights_whose_rows_overflow_together_are_refused(size):
    for names in (("key_weight", "value_weight"), ("query_weight", "key_weight", "value_weight")):
        call = ModuleCall(keeps=False)
        for name in names:
            call.fields(name).size[0] = size
        assert_refused(call)


def test_many_positions_without_features_need_no_small_workspace():
    """N, L and the heads are possible each, and no tensor has an element, but the projections would overflow."""
    call = ModuleCall(keeps=False, H_kv=4, D_v=3)
    for name in ("attn_mask", "key_padding_mask", "weights", "lse", "bias_k", "bias_v", *BIASES):
        call.fields(name).data = None
    for name in (*INPUTS, "output"):
        call.fields(name).size[:] = [2**31, 2**30, 0, 1]
    heads, size = 2**20, 2**20
    call.arguments.num_heads = heads
    for name in WEIGHTS:
        call.fields(name).size[:] = [0, heads * size, 1, 1] if name == "out_weight" else [heads * size, 0, 1, 1]
    call.arguments.core.attention.dropout_p = 0.0
    call.arguments.core.attention.add_zero_attn = 0
    needed = call.workspace()
    assert needed < 0 or needed >= 2**30 * heads * size * 4
    assert call.error() is not None


def product_call():
    return ProductCall(torch.ones(2, 3, 5), torch.ones(5, 4), torch.full((2, 3, 4), float("nan")), (False, False))


@pytest.mark.parametrize("name", ["left", "right", "bias", "output", "workspace"])
def test_a_product_refuses_what_does_not_fit(base_isa, name):
    call = product_call()
    assert call.error() is None
    assert torch.equal(call.tensors["output"], torch.full((2, 3, 4), 5.0))
    changes = [("bytes", None, -1), *(("size", d, change) for d in range(3) for change in (1, -1, 2**62))]
    changes += [("stride", d, -100) for d in range(3)]
    for attribute, dimension, change in changes:
        if name == "workspace" and (dimension != 0 or attribute == "stride"):
            continue
        if name == "bias" and attribute == "stride" and dimension:
            continue
        call = product_call()
        fields = call.fields(name)
        if dimension is None:
            fields.bytes += change
        else:
            getattr(fields, attribute)[dimension] += change
        assert_refused(call)


def test_a_product_of_as_many_rows_in_other_batches_is_served():
    call = ProductCall(torch.ones(3, 2, 5), torch.ones(5, 4), torch.full((2, 3, 4), float("nan")), (False, False))
    assert call.error() is None
    assert torch.equal(call.tensors["output"], torch.full((2, 3, 4), 5.0))

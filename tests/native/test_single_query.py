"""A single query, whose keys and values are read where they lie, all heads of a task at once: forward and backward."""

import pytest
import torch

from attention_oracle import make_arguments
from native.call_space import DTYPES, LAYOUTS, lay_out
from native.dense_oracle import assert_matches_dense, native_attention

HEADS = [(1, 1), (2, 2), (3, 3), (6, 2), (7, 1), (12, 12), (16, 4), (17, 17), (34, 2)]
MASKS = {
    "no mask": {},
    "padding": {"padding_dtype": torch.bool, "hidden": 0.5},
    "additive masks": {"mask_dtype": torch.float32, "mask_shape": "NHLS", "padding_dtype": torch.float32},
    "masks of some heads": {"mask_dtype": torch.bool, "mask_shape": "HS", "hidden": 0.9},
    "window": {"window": (700, 100), "causal_alignment": "bottom_right"},
    "virtual keys": {"bias_kv": True, "add_zero_attn": True, "padding_dtype": torch.bool, "hidden": 0.3},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_any_number_of_heads(isa, heads, dtype):
    H, H_kv = heads
    assert_matches_dense(make_arguments(N=2, L=1, S=70, H=H, H_kv=H_kv, D=17, D_v=33, dtype=dtype, return_lse=True))


@each_dtype
@pytest.mark.parametrize("D", [8, 16, 32, 40, 64, 128, 144, 256])
def test_head_sizes_of_whole_vectors_and_others(isa, D, dtype):
    assert_matches_dense(make_arguments(N=1, L=1, S=37, H=5, H_kv=5, D=D, D_v=D, dtype=dtype))


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("S", [1, 31, 33, 512, 1100])
def test_masks_over_several_tiles_of_keys(base_isa, masks, S):
    assert_matches_dense(make_arguments(N=3, L=1, S=S, H=6, H_kv=3, D=16, D_v=16, **masks, return_lse=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(base_isa, layout):
    arguments = make_arguments(N=2, L=1, S=90, H=6, H_kv=3, D=16, D_v=32)
    for name in ("query", "key", "value"):
        arguments[name] = lay_out(arguments[name], layout)
    assert_matches_dense(arguments)


@each_dtype
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_threads_and_weights_change_no_bit(isa, masks, dtype, set_num_threads):
    arguments = make_arguments(N=1, L=1, S=600, H=14, H_kv=7, D=64, D_v=64, dtype=dtype, **masks)
    set_num_threads(1)
    alone = native_attention(**arguments).output
    for threads in (2, 3, 5, 16, 40):  # which divide the heads among their tasks
        set_num_threads(threads)
        assert torch.equal(native_attention(**arguments).output, alone)
    for average in (True, False):
        other = native_attention(**arguments, need_weights=True, average_attn_weights=average)
        assert torch.equal(other.output, alone)


def test_poison_in_hidden_keys_is_not_read(base_isa):
    arguments = make_arguments(N=2, L=1, S=300, H=6, H_kv=3, D=16, D_v=16, padding_dtype=torch.bool, hidden=0.5)
    clean = native_attention(**arguments).output
    padding = arguments["key_padding_mask"]
    for name in ("key", "value"):
        arguments[name] = arguments[name].masked_fill(padding[:, :, None, None], float("nan"))
    assert torch.equal(native_attention(**arguments).output, clean)

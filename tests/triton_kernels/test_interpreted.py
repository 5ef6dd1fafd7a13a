"""The Triton kernels under the interpreter against the fp64 oracle: every result and every gradient.

fp32 and fp16 alone: the interpreter's bfloat16 arithmetic is wrong.
"""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from attention_oracle import make_arguments
from native.call_space import Call, calls
from native.dense_oracle import assert_matches_dense, drawn_seed

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.float16)
EVERYTHING = {"need_weights": True, "return_lse": True}
PER_HEAD = EVERYTHING | {"average_attn_weights": False}
CASES = {
    "plain": {},
    "averaged weights": EVERYTHING,
    "weights per head": PER_HEAD,
    "causal": EVERYTHING | {"is_causal": True},
    "causal, bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": EVERYTHING | {"window": (40, 20)},
    "window beside virtual keys": EVERYTHING | {"window": (3, 0), "bias_kv": True, "add_zero_attn": True},
    "bool mask and padding": {
        "mask_dtype": torch.bool,
        "mask_shape": "HLS",
        "padding_dtype": torch.bool,
        "hidden": 0.5,
    },
    "float mask and padding": {"mask_dtype": torch.float32, "padding_dtype": torch.float32, "hidden": 0.2},
    "float mask of rows and heads": {"mask_dtype": torch.float16, "mask_shape": "NHLS", "need_weights": True},
    "float mask of keys": {"mask_dtype": torch.float32, "mask_shape": "S", "bias_kv": True},
    "dropout": PER_HEAD | {"dropout_p": 0.3},
    "dropout, causal, padding, virtual keys": EVERYTHING
    | {"dropout_p": 0.5, "is_causal": True, "padding_dtype": torch.bool, "bias_kv": True, "add_zero_attn": True},
    "everything dropped": EVERYTHING | {"dropout_p": 1.0},
    "negative scale": {"scale": -0.4, "is_causal": True},
    "no scale": {"scale": 0.0, "padding_dtype": torch.bool},
}


@pytest.fixture(autouse=True)
def without_numpys_warnings():
    """The interpreter computes by NumPy, which warns of what `tl.where` then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def matches_oracle(attention, arguments, seed=(5, 7)):
    call = Call({"dropout_p": 0.0, "add_zero_attn": False} | arguments, seed)
    with drawn_seed(*seed):
        return assert_matches_dense(arguments, call.keep(), attention=attention)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_several_tiles(attention, case, dtype):
    matches_oracle(attention, make_arguments(N=2, L=70, S=90, H=2, H_kv=1, D=24, D_v=16, dtype=dtype, **case))


@pytest.mark.parametrize("D", [1, 8, 40, 64, 80, 128, 200, 256])
def test_head_sizes(attention, D):
    matches_oracle(attention, make_arguments(N=1, L=5, S=37, H=2, H_kv=2, D=D, D_v=D, is_causal=True))


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 130), (130, 1), (64, 64), (65, 31), (3, 127), (16, 256)])
def test_lengths(attention, L, S):
    arguments = make_arguments(N=1, L=L, S=S, H=1, H_kv=1, D=16, bias_kv=True, is_causal=True, **EVERYTHING)
    matches_oracle(attention, arguments)


@settings(
    max_examples=25,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls(dtypes=DTYPES, dropout=(0.0, 0.0, 0.3), smallest=1))
def test_any_call(attention, call):
    assume(call.arguments["query"].shape[3] >= 4)  # torch's error in smaller heads, the measure, is luck
    matches_oracle(attention, call.arguments, call.seed)

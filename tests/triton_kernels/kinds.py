"""The kinds of calls that the Triton kernels serve, for their tests under the interpreter and on a GPU."""

import torch

from native.call_space import Call
from native.dense_oracle import assert_matches_dense, drawn_seed

SINKS, SLOPES = ("sinks",), ("alibi_slopes",)
EVERYTHING = {"need_weights": True, "return_lse": True}
PER_HEAD = EVERYTHING | {"average_attn_weights": False}
CASES = {
    "plain": {},
    "averaged weights": EVERYTHING,
    "weights per head": PER_HEAD,
    "weights of a head": {"weights_of_heads": (0,), "return_lse": True},
    "weights of a head, causal, padding, dropout, virtual keys": {"weights_of_heads": (0,), "is_causal": True}
    | {"padding_dtype": torch.bool, "dropout_p": 0.3, "bias_kv": True},
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
    "softcap": PER_HEAD | {"softcap": 0.8},
    "softcap, causal, padding, dropout": EVERYTHING
    | {"softcap": 3.0, "is_causal": True, "padding_dtype": torch.bool, "dropout_p": 0.3},
    "sinks": EVERYTHING | {"of_heads": SINKS},
    "sinks, window": EVERYTHING | {"of_heads": SINKS, "window": (10, 0)},
    "sinks, hidden rows": EVERYTHING
    | {"of_heads": SINKS, "mask_dtype": torch.bool, "hidden": 0.97, "padding_dtype": torch.bool},
    "sinks, float mask, dropout": PER_HEAD | {"of_heads": SINKS, "mask_dtype": torch.float32, "dropout_p": 0.4},
    "sinks, negative scale": {"of_heads": SINKS, "scale": -0.4, "bias_kv": True},
    "ALiBi": PER_HEAD | {"of_heads": SLOPES},
    "ALiBi, causal, bottom right": {"of_heads": SLOPES, "is_causal": True, "causal_alignment": "bottom_right"},
    "ALiBi, masks, virtual keys": EVERYTHING
    | {"of_heads": SLOPES, "mask_dtype": torch.float32, "padding_dtype": torch.bool, "bias_kv": True}
    | {"add_zero_attn": True, "causal_alignment": "bottom_right"},
    "softcap, sinks, ALiBi": EVERYTHING | {"softcap": 2.0, "of_heads": SINKS + SLOPES},
    "softcap, sinks, ALiBi, masks, virtual keys": PER_HEAD
    | {"softcap": 0.5, "of_heads": SINKS + SLOPES, "mask_dtype": torch.bool, "mask_shape": "NHLS", "hidden": 0.6}
    | {"padding_dtype": torch.float32, "bias_kv": True, "is_causal": True},
}


def matches_oracle(attention, arguments, seed=(5, 7)):
    call = Call({"dropout_p": 0.0, "add_zero_attn": False} | arguments, seed)
    with drawn_seed(*seed):
        return assert_matches_dense(arguments, call.keep(), attention=attention)

"""More keys than one task of the backward has, beside every option of a call: gradients add up over chunks of keys.

A chunk has 512 keys of up to 64 features, and fewer of more: heads of 256 features cross its edge with 128 keys.
"""

import pytest
import torch

from attention_oracle import make_arguments
from native.dense_oracle import assert_matches_dense, drawn_seed

AVERAGED = {"need_weights": True}
PER_HEAD = {"need_weights": True, "average_attn_weights": False}
RESULTS = {
    "output": ({}, ("output",)),
    "averaged weights": (AVERAGED, ("output", "weights")),
    "weights per head": (PER_HEAD, ("output", "weights")),
    "weights alone": (AVERAGED, ("weights",)),
    "everything": (PER_HEAD | {"return_lse": True}, ("output", "weights", "lse")),
    "weights of a head": ({"weights_of_heads": (1,)}, ("output", "weights")),
}
OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.4},
    "dropout, virtual keys": {"dropout_p": 0.4, "bias_kv": True, "add_zero_attn": True},
    "causal": {"is_causal": True},
    "causal, bottom right, dropout": {"is_causal": True, "causal_alignment": "bottom_right", "dropout_p": 0.2},
    "window": {"window": (70, 30), "bias_kv": True},
    "bool mask and padding": {"mask_dtype": torch.bool, "mask_shape": "NHLS", "padding_dtype": torch.bool},
    "float mask and padding": {"mask_dtype": torch.float32, "mask_shape": "HLS", "padding_dtype": torch.float32},
    "padding that hides whole chunks": {"padding_dtype": torch.bool, "hidden": 0.95, "add_zero_attn": True},
    "softcap, sinks and ALiBi": {"softcap": 1.5, "of_heads": ("sinks", "alibi_slopes"), "bias_kv": True},
    "softcap and sinks, causal": {"softcap": 0.8, "of_heads": ("sinks",), "is_causal": True, "dropout_p": 0.3},
    "ALiBi, padding": {"of_heads": ("sinks", "alibi_slopes"), "padding_dtype": torch.bool, "hidden": 0.95},
    "negative scale": {"scale": -0.3, "mask_dtype": torch.float32, "mask_shape": "NLS"},
}
SIZES = {
    "small heads": {"L": 75, "S": 530, "D": 5, "D_v": 3},
    "large heads": {"L": 9, "S": 291, "D": 256, "D_v": 17},
    "large values": {"L": 16, "S": 130, "D": 8, "D_v": 256},
    "one query": {"L": 1, "S": 1030, "D": 16, "D_v": 16},
}


# Every option with every kind of results; the sizes take turns.
CALLS = {
    f"{options}-{results}": (OPTIONS[options], *RESULTS[results], list(SIZES.values())[(i + j) % len(SIZES)])
    for i, options in enumerate(OPTIONS)
    for j, results in enumerate(RESULTS)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("options", "wanted", "through", "sizes"), CALLS.values(), ids=CALLS)
def test_gradients_beside_every_option(isa, options, wanted, through, sizes, dtype):
    arguments = make_arguments(N=1, H=2, H_kv=1, dtype=dtype, **sizes, **({"hidden": 0.3} | options), **wanted)
    keep = None
    if "dropout_p" in options:
        width = sizes["S"] + ("bias_k" in arguments) + bool(arguments.get("add_zero_attn"))
        keep = torch.ops.fused_mha.dropout_mask(torch.tensor([5, 6]), (1, 2, sizes["L"], width), options["dropout_p"])
    with drawn_seed(5, 6):
        assert_matches_dense(arguments, keep, through=through)

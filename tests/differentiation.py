"""Attention as a function of its floating tensors alone, whose derivatives tests hold against numeric ones."""

import torch

CASES = {
    "plain": {},
    "grouped and causal": {"H": 4, "H_kv": 2, "is_causal": True},
    "bool mask": {"mask_dtype": torch.bool, "mask_shape": "NHLS"},
    "float mask": {"mask_dtype": torch.float64},
    "float mask per head": {"mask_dtype": torch.float64, "mask_shape": "HLS"},
    "float padding": {"padding_dtype": torch.float64, "mask_dtype": torch.bool},
    "virtual keys": {"bias_kv": True, "add_zero_attn": True, "padding_dtype": torch.bool},
    "window": {"window": (1, 0), "causal_alignment": "bottom_right"},
}


def finite(arguments):
    """The same with -50 for -inf in float masks: numeric differentiation of -inf is NaN."""
    return {
        name: x.clamp(min=-50.0) if name in ("attn_mask", "key_padding_mask") and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def as_function(attention, arguments, forget=()):
    """The results that are not forgotten, by the floating tensors, and those; a constant -inf of the lse becomes 0."""
    arguments = finite(arguments)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}

    def function(*values):
        results = attention(**arguments | dict(zip(tensors, values, strict=True)))._asdict()
        if results["lse"] is not None:
            results["lse"] = results["lse"].masked_fill(results["lse"] == float("-inf"), 0.0)
        return tuple(x for name, x in results.items() if x is not None and name not in forget)

    return function, tuple(x.requires_grad_() for x in tensors.values())

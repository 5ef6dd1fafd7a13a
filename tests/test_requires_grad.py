"""Which results require a gradient, and which gradients are None: as in torch's module, whichever way a call takes."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_mha
from calls import composed
from fused_mha.testing import Case

INPUTS = ("query", "key", "value")
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
OTHERS = ("in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias")
EVERYTHING = "everything"


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WAYS = {
    "one call": contextlib.nullcontext,
    "step by step": composed,
    "operators": SeesOperators,
    "reference": lambda: fused_mha.backend("reference"),
}


def facts(module, inputs, arguments, learns):
    """Whether output and weights require a gradient, and which leaves get one of the output, the weights and both."""
    leaves = dict(zip(INPUTS, inputs, strict=True)) | dict(module.named_parameters())
    for name, x in leaves.items():
        x.requires_grad_(learns in (name, EVERYTHING))
    results = module(*inputs, **arguments)
    recorded = [x for x in leaves.values() if x.requires_grad]
    found = [x.requires_grad for x in results]
    for x in (*results, torch.cat([y.flatten() for y in results])):
        if x.requires_grad:
            gradients = torch.autograd.grad(x.sum(), recorded, retain_graph=True, allow_unused=True)
            found.append([gradient is not None for gradient in gradients])
    return found


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hook on out_proj"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("learns", "sharing", "kdim"),
    [
        *((name, "separate", None) for name in (*INPUTS, "in_proj_weight", *OTHERS, EVERYTHING)),
        *((name, "separate", 5) for name in (*INPUTS, *PROJECTIONS, *OTHERS, EVERYTHING)),
        ("value", "cross", None),
        ("bias_v", "self", None),
    ],
)
def test_as_in_torchs_module(learns, sharing, kdim, way, hooked, one_calls):
    case = Case(N=1, L=2, S=3, embed_dim=4, num_heads=1, sharing=sharing, kdim=kdim, vdim=kdim, add_bias_kv=True)
    ours, theirs, inputs, arguments = case.build()
    expected = facts(theirs, inputs, arguments, learns)
    if hooked:
        ours.out_proj.register_forward_hook(lambda *_: None)
    with way():
        assert facts(ours, inputs, arguments, learns) == expected
    assert one_calls in ([], [way is contextlib.nullcontext and not hooked])


@pytest.mark.parametrize("back_end", ["cpu", "reference"])
@pytest.mark.parametrize(("learns", "expected"), [("value", (True, False, False)), ("key", (True, True, True))])
def test_weights_and_log_sum_exp_are_no_functions_of_the_values(back_end, learns, expected):
    tensors = {name: torch.randn(1, 3, 2, 4) for name in INPUTS}
    tensors[learns].requires_grad_()
    with fused_mha.backend(back_end):
        results = fused_mha.attention(**tensors, need_weights=True, return_lse=True)
    assert tuple(x.requires_grad for x in results) == expected

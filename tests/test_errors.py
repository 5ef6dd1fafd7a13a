"""A mistake raises the type that torch's module raises, says what came and what was expected, and changes nothing."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fused_mha import MultiHeadAttention

N, L, S, E, H = 3, 4, 6, 8, 2
META = torch.device("meta")


def _true(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


class Mistake(NamedTuple):
    """A call that is wrong in one argument, by default of a module (8, 2, batch_first=True) on (3, 4|6, 8)."""

    name: str
    text: str  # all of it stands in our message
    call: dict[str, Any]
    module: dict[str, Any] = {}  # noqa: RUF012 - never changed
    torch_takes_it: bool = False  # torch with weights computes something on the meta device


SHAPES_OF_A_MASK = "attn_mask must have shape (L, S) = (4, 6), (N*num_heads, L, S) = (6, 4, 6)"
ROLES = ("query", "key", "value")
ARRAY = np.zeros((N, L, E), dtype=np.float32)
UNBATCHED = {"query": torch.randn(L, E), "key": torch.randn(S, E), "value": torch.randn(S, E)}

RANKS_AND_SIZES = [
    Mistake(
        "1-D query", "query must be unbatched 2-D or batched 3-D; got a 1-D tensor, (8,)", {"query": torch.zeros(E)}
    ),
    Mistake("4-D query", "got a 4-D tensor, (1, 3, 4, 8)", {"query": torch.zeros(1, N, L, E)}),
    Mistake(
        "unbatched key",
        "key and value must be 3-D, as query is; got 2-D and 3-D tensors, (6, 8) and (3, 6, 8)",
        {"key": torch.zeros(S, E)},
    ),
    Mistake("unbatched value", "got 3-D and 2-D tensors, (3, 6, 8) and (6, 8)", {"value": torch.zeros(S, E)}),
    Mistake(
        "unbatched query alone",
        "key and value must be 2-D, as query is; got 3-D and 3-D tensors",
        {"query": torch.zeros(L, E)},
    ),
    Mistake(
        "size of the query",
        "query must have embedding size embed_dim = 8; got shape (3, 4, 10)",
        {"query": torch.zeros(N, L, 10)},
    ),
    Mistake(
        "length of the value",
        "key and value must agree in length and batch size; got (3, 6, 8) and (3, 5, 8)",
        {"value": torch.zeros(N, 5, E)},
    ),
    Mistake("batch of the value", "got (3, 6, 8) and (2, 6, 8)", {"value": torch.zeros(2, S, E)}),
    Mistake(
        "size of the value",
        "key and value must have sizes kdim = 8 and vdim = 8; got (3, 6, 8) and (3, 6, 5)",
        {"value": torch.zeros(N, S, 5)},
    ),
    Mistake(
        "one size of key and value",
        "key and value must have sizes kdim = 8 and vdim = 8; got (3, 6, 5) and (3, 6, 5)",
        {"key": torch.zeros(N, S, 5), "value": torch.zeros(N, S, 5)},
    ),
    Mistake(
        "one size of key and value, sequence first",
        "got (6, 3, 10) and (6, 3, 10)",
        {"query": torch.zeros(L, N, E), "key": torch.zeros(S, N, 10), "value": torch.zeros(S, N, 10)},
        {"batch_first": False},
    ),
    Mistake(
        "one size of unbatched key and value",
        "got (6, 5) and (6, 5)",
        {**UNBATCHED, **dict.fromkeys(("key", "value"), torch.zeros(S, 5))},
    ),
    Mistake(
        "one size of key and value, with kdim and vdim",
        "key and value must have sizes kdim = 5 and vdim = 7; got (3, 6, 8) and (3, 6, 8)",
        {},
        {"kdim": 5, "vdim": 7},
    ),
    Mistake(
        "length of the value with kdim",
        "got (3, 6, 5) and (3, 7, 8)",
        {"key": torch.zeros(N, S, 5), "value": torch.zeros(N, 7, E)},
        {"kdim": 5},
    ),
    Mistake(
        "batch of key and value",
        "query and key must have one batch size (dimension 0, batch_first=True); got (3, 4, 8) and (2, 6, 8)",
        {"key": torch.zeros(2, S, E), "value": torch.zeros(2, S, E)},
    ),
    Mistake(
        "batch-first input of a sequence-first module",
        "query and key must have one batch size (dimension 1, batch_first=False); got (3, 4, 8) and (3, 6, 8)",
        {},
        {"batch_first": False},
    ),
]

MASKS = [
    Mistake(
        "transposed attn_mask",
        f"{SHAPES_OF_A_MASK} or (N|1, num_heads|1, L|1, S) with (3, 2, 4, 6); got (6, 4). Is it transposed?",
        {"attn_mask": _true(S, L)},
    ),
    Mistake("transposed attn_mask per head", "got (6, 6, 4). Is it transposed?", {"attn_mask": _true(N * H, S, L)}),
    Mistake("attn_mask of one row", f"{SHAPES_OF_A_MASK} or ", {"attn_mask": _true(1, S)}),
    Mistake("attn_mask of one row names its shape", "got (1, 6)", {"attn_mask": _true(1, S)}),
    Mistake("attn_mask per sequence", "got (3, 4, 6)", {"attn_mask": _true(N, L, S)}),
    Mistake("attn_mask per head alone", "got (2, 4, 6)", {"attn_mask": _true(H, L, S)}),
    Mistake("1-D attn_mask", "attn_mask must be 2-D, 3-D or 4-D; got a 1-D tensor, (6,)", {"attn_mask": _true(S)}),
    Mistake("5-D attn_mask", "got a 5-D tensor, (1, 1, 1, 4, 6)", {"attn_mask": _true(1, 1, 1, L, S)}),
    Mistake(
        "integer attn_mask",
        "attn_mask must be of dtype bool (True = ignore) or floating point (added to the scores); got torch.int64",
        {"attn_mask": torch.zeros(L, S, dtype=torch.int64)},
    ),
    Mistake("byte attn_mask", "got torch.uint8", {"attn_mask": torch.zeros(L, S, dtype=torch.uint8)}),
    Mistake(
        "unbatched attn_mask of another number of heads",
        "(N*num_heads, L, S) = (2, 4, 6) or (N|1, num_heads|1, L|1, S) with (1, 2, 4, 6); got (3, 4, 6)",
        {**UNBATCHED, "attn_mask": _true(3, L, S)},
    ),
    Mistake("unbatched transposed attn_mask", "got (6, 4). Is it transposed?", {**UNBATCHED, "attn_mask": _true(S, L)}),
    Mistake(
        "transposed key_padding_mask",
        "key_padding_mask must have shape (N, S) = (3, 6); got (6, 3). Is it transposed?",
        {"key_padding_mask": _true(S, N)},
    ),
    Mistake("key_padding_mask of the queries", "(N, S) = (3, 6); got (3, 4)", {"key_padding_mask": _true(N, L)}),
    Mistake("key_padding_mask of one sequence", "(N, S) = (3, 6); got (1, 6)", {"key_padding_mask": _true(1, S)}),
    Mistake("1-D key_padding_mask", "(N, S) = (3, 6); got (6,)", {"key_padding_mask": _true(S)}),
    Mistake("3-D key_padding_mask", "(N, S) = (3, 6); got (3, 1, 6)", {"key_padding_mask": _true(N, 1, S)}),
    Mistake(
        "unbatched input with a batched key_padding_mask",
        "key_padding_mask must have shape (S) = (6,); got (1, 6)",
        {**UNBATCHED, "key_padding_mask": _true(1, S)},
    ),
    Mistake(
        "unbatched key_padding_mask of another length",
        "(S) = (6,); got (4,)",
        {**UNBATCHED, "key_padding_mask": _true(L)},
    ),
    Mistake(
        "integer key_padding_mask",
        "key_padding_mask must be of dtype bool (True = ignore) or floating point (added to the scores); got "
        "torch.int32",
        {"key_padding_mask": torch.zeros(N, S, dtype=torch.int32)},
    ),
    Mistake(
        "key_padding_mask beside virtual keys counts them",
        "(N, S) = (3, 6); got (3, 7)",
        {"key_padding_mask": _true(N, S + 1)},
        {"add_bias_kv": True},
    ),
]

NO_TENSORS = [
    *(Mistake(f"no {name}", f"{name} must be a Tensor, not NoneType", {name: None}) for name in ROLES),
    *(Mistake(f"an array as {name}", f"{name} must be a Tensor, not numpy.ndarray", {name: ARRAY}) for name in ROLES),
    Mistake("a number as the value", "value must be a Tensor, not float", {"value": 1.0}),
    *(
        Mistake(
            f"{type(mask).__name__} as {name}", f"{name} must be a Tensor, not {text}: torch.as_tensor", {name: mask}
        )
        for name in ("attn_mask", "key_padding_mask")
        for mask, text in ((ARRAY, "numpy.ndarray"), (ARRAY == 0, "numpy.ndarray"), ([[False]], "list"))
    ),
]

DTYPES_AND_DEVICES = [
    Mistake(
        "fp64 input of an fp32 module",
        "must have one dtype (or run under torch.autocast); got torch.float64, torch.float64, torch.float64 and "
        "torch.float32",
        {
            "query": torch.zeros(N, L, E).double(),
            "key": torch.zeros(N, S, E).double(),
            "value": torch.zeros(N, S, E).double(),
        },
    ),
    Mistake(
        "fp16 key",
        "got torch.float32, torch.float16, torch.float32 and torch.float32",
        {"key": torch.zeros(N, S, E).half()},
    ),
    Mistake(
        "fp32 input of a bf16 module",
        "got torch.float32, torch.float32, torch.float32 and torch.bfloat16",
        {},
        {"dtype": torch.bfloat16},
    ),
    Mistake("integer query", "got torch.int64, torch.float32", {"query": torch.zeros(N, L, E, dtype=torch.int64)}),
    Mistake(
        "query on another device",
        "all tensors must be on query's device, meta; got key on cpu",
        {"query": torch.zeros(N, L, E, device=META)},
        torch_takes_it=True,
    ),
    Mistake(
        "key and value on another device",
        "all tensors must be on query's device, cpu; got key on meta",
        {"key": torch.zeros(N, S, E, device=META), "value": torch.zeros(N, S, E, device=META)},
    ),
    Mistake(
        "attn_mask on another device",
        "got attn_mask on meta",
        {"attn_mask": torch.zeros(L, S, device=META)},
        torch_takes_it=True,
    ),
    Mistake(
        "key_padding_mask on another device",
        "got key_padding_mask on meta",
        {"key_padding_mask": torch.zeros(N, S, device=META)},
        torch_takes_it=True,
    ),
    Mistake("module on another device", "got the module's projection weight on meta", {}, {"device": "meta"}),
]

MISTAKES = RANKS_AND_SIZES + MASKS + NO_TENSORS + DTYPES_AND_DEVICES


def _arguments(mistake: Mistake) -> dict[str, Any]:
    key = torch.randn(N, S, E, requires_grad=True)
    return {"query": torch.randn(N, L, E, requires_grad=True), "key": key, "value": key, **mistake.call}


def _snapshot(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **arguments}
    values = {
        name: (x.clone(), x._version, x.grad, x.requires_grad) for name, x in tensors.items() if isinstance(x, Tensor)
    }
    return {"values": values, "state": dict(vars(module)), "generator": torch.get_rng_state()}


def _assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before["generator"], after["generator"])
    assert before["state"].keys() == after["state"].keys()
    assert all(before["state"][name] is value for name, value in after["state"].items())
    for name, (value, version, grad, requires_grad) in before["values"].items():
        now = after["values"][name]
        assert now[1:] == (version, grad, requires_grad), name
        assert value.is_meta or torch.equal(now[0], value), name


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_raises_the_type_of_torch_and_says_what_came(mistake, need_weights):
    constructor_arguments = {"batch_first": True, "dropout": 0.5, **mistake.module}
    ours, theirs = (kind(E, H, **constructor_arguments) for kind in (MultiHeadAttention, nn.MultiheadAttention))
    arguments = {**_arguments(mistake), "need_weights": need_weights}
    expected = RuntimeError
    if not (mistake.torch_takes_it and need_weights):
        with pytest.raises(Exception) as raised_by_torch:  # noqa: PT011 - which one is what we ask torch
            theirs(**arguments)
        expected = type(raised_by_torch.value)
    before = _snapshot(ours, arguments)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        ours(**arguments)
    assert type(raised.value) is expected, raised.value
    assert mistake.text in str(raised.value)
    _assert_unchanged(before, _snapshot(ours, arguments))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_raises_the_same_error_in_inference(mistake, training):
    module = MultiHeadAttention(E, H, **{"batch_first": True, **mistake.module})
    arguments = _arguments(mistake)
    with pytest.raises((AssertionError, RuntimeError, TypeError, AttributeError)) as expected:
        module(**arguments)
    with torch.no_grad(), pytest.raises(type(expected.value)) as raised:
        module.train(training)(**arguments)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 2), "embed_dim and num_heads must be greater than 0, got embed_dim=0 and num_heads=2 instead"),
        ((8, 0), "got embed_dim=8 and num_heads=0 instead"),
        ((-8, 2), "got embed_dim=-8 and num_heads=2 instead"),
        ((8, -2), "got embed_dim=8 and num_heads=-2 instead"),
        ((10, 4), "embed_dim must be divisible by num_heads, got embed_dim=10 and num_heads=4"),
        ((4, 8), "got embed_dim=4 and num_heads=8"),
    ],
    ids=str,
)
def test_constructor_raises_the_type_of_torch_and_draws_nothing(arguments, text):
    with pytest.raises((ValueError, AssertionError)) as expected:
        nn.MultiheadAttention(*arguments)
    before = torch.get_rng_state()
    with pytest.raises(type(expected.value)) as raised:
        MultiHeadAttention(*arguments)
    assert text in str(raised.value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_number_of_heads_that_is_no_integer_raises_the_type_of_torch(batch_first, training):
    x = torch.randn(N, L, E)
    theirs, ours = (
        kind(E, 2.0, batch_first=batch_first).train(training) for kind in (nn.MultiheadAttention, MultiHeadAttention)
    )
    with pytest.raises(TypeError):
        theirs(x, x, x)
    with pytest.raises(TypeError, match=r"num_heads must be an int; got 2\.0"):
        ours(x, x, x)
    for right in (np.int64(2), 2):
        ours.num_heads = right
        ours(x, x, x)
        ours.num_heads = 2.0
        with pytest.raises(TypeError, match=r"num_heads must be an int; got 2\.0"):
            ours(x, x, x)


@pytest.mark.parametrize("shape", [(N, H, S, L), (N, 3, L, S), (2, 1, L, S), (1, 1, L, 1)], ids=str)
def test_4d_mask_that_does_not_broadcast_is_refused_by_its_shape(shape):
    x, y = torch.randn(N, L, E), torch.randn(N, S, E)
    text = rf"with \(3, 2, 4, 6\); got \({', '.join(map(str, shape))}\)"
    with pytest.raises(RuntimeError, match=text):
        MultiHeadAttention(E, H, batch_first=True)(x, y, y, attn_mask=_true(*shape))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dropout", [1.5, -0.5])
def test_dropout_outside_0_and_1_is_refused_in_training_alone(dropout, need_weights):
    module = MultiHeadAttention(E, H, dropout=dropout)
    x = torch.randn(L, N, E)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=f"has to be between 0 and 1, but got {dropout}"):
        module(x, x, x, need_weights=need_weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    module.eval()(x, x, x, need_weights=need_weights)


def test_dropout_above_1_raises_the_type_of_torch_with_weights():
    x = torch.randn(L, N, E)
    for kind in (nn.MultiheadAttention, MultiHeadAttention):
        with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
            kind(E, H, dropout=1.5)(x, x, x)

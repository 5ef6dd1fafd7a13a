"""What makes a kind of calls, for `plans`, and which calls have none."""

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fused_mha
from attention_oracle import make_arguments
from fused_mha.core import memory, plans

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def kind_of(**arguments):
    """That of a call; None where it goes the general way."""
    names = ("query", "key", "value", "sinks", "alibi_slopes", "attn_mask", "key_padding_mask", "bias_k", "bias_v")
    return plans.kind_of(tuple(map(arguments.get, names)), ("top_left", False))


def test_calls_that_differ_by_values_alone_are_of_one():
    first, second = (make_arguments(seed=seed, padding_dtype=torch.bool) for seed in (0, 1))
    assert kind_of(**first) == kind_of(**second) is not None


@pytest.mark.parametrize(
    "other",
    [
        {"L": 5},
        {"H_kv": 4},
        {"D_v": 4},
        {"dtype": torch.float16},
        {"mask_dtype": torch.bool},
        {"mask_dtype": torch.float32},
        {"padding_dtype": torch.bool},
        {"bias_kv": True},
        {"of_heads": ("sinks",)},
        {"of_heads": ("alibi_slopes",)},
    ],
    ids=str,
)
def test_sizes_dtypes_and_masks_make_others(other):
    assert kind_of(**make_arguments()) != kind_of(**make_arguments(**other))


def test_strides_and_addresses_make_others():
    arguments = make_arguments(D=8)
    query = arguments["query"]
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    moved = torch.cat([query.new_zeros(1), query.flatten()])[1:].view(query.shape)
    kinds = [kind_of(**arguments | {"query": x}) for x in (query, strided, moved)]
    assert len(set(kinds)) == 3


def test_dtypes_of_sinks_make_others():
    arguments = make_arguments(of_heads=("sinks",))
    assert kind_of(**arguments) != kind_of(**arguments | {"sinks": arguments["sinks"].half()})


def test_every_flag_makes_another(launches):
    flags = [
        {},
        {"is_causal": True},
        {"causal_alignment": "bottom_right"},
        {"window": (3, None)},
        {"add_zero_attn": True},
        {"dropout_p": 0.5},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"need_weights": True},
        {"average_attn_weights": False},
        {"return_lse": True},
        {"weights_of_heads": (1, 0)},
        {"weights_of_heads": (0, 1)},
    ]
    arguments = make_arguments()
    for count, given in enumerate(flags, 1):
        fused_mha.attention(**arguments, **given)
        assert len(plans._kept) == count
    with fused_mha.backend("cpu"):
        fused_mha.attention(**arguments)
    assert len(plans._kept) == len(flags) + 1


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ({"weights_of_heads": (0, 1)}, {"weights_of_heads": (False, 1)}, TypeError),
        ({"weights_of_heads": (0, 1)}, {"weights_of_heads": (0.0, 1)}, TypeError),
        ({"window": (1, 0)}, {"window": (1.0, 0)}, ValueError),
        ({"softcap": 1.0}, {"softcap": True}, ValueError),
    ],
    ids=str,
)
def test_a_wrong_flag_that_is_equal_to_a_right_one_is_refused_after_it(right, wrong, error, launches):
    arguments = make_arguments()
    for _ in range(2):
        fused_mha.attention(**arguments, **right)
        with pytest.raises(error, match=f"{next(iter(wrong))} must be"):
            fused_mha.attention(**arguments, **wrong)


def test_what_is_not_given_is_no_tensor_that_is_given_twice():
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    calls = [(x, x, None, y), (x, x, y, None), (x, None, x, y), (x, x, y, y), (x, y, None, None), (x, None, None, y)]
    places = [plans.place_of(call, ()) for call in calls]
    assert len({place.key for place in places if place is not None}) == len(calls)


def test_many_lengths_in_turn_are_known(launches, monkeypatch):
    calls = [make_arguments(S=S, padding_dtype=torch.bool) for S in range(3, 20)]
    for _ in range(2):
        for arguments in calls:
            fused_mha.attention(**arguments)
    monkeypatch.setattr(plans, "kind_of", lambda *_: pytest.fail("it was not found by torch's guards"))
    for arguments in calls:
        fused_mha.attention(**arguments)


def test_a_forced_back_end_serves(launches):
    arguments = make_arguments()
    fused_mha.attention(**arguments)
    launches.by_triton.clear()
    with fused_mha.backend("reference"):
        assert fused_mha.attention(**arguments).output.isfinite().all()
    assert not launches.by_triton


@pytest.mark.parametrize("back_end", ["sdpa", "reference"])
@pytest.mark.parametrize("mask_shape", ["LS", "NHLS"])
def test_what_other_back_ends_serve_is_checked_once_too(back_end, mask_shape, monkeypatch):
    options = {"mask_dtype": torch.float32, "mask_shape": mask_shape, "padding_dtype": torch.bool, "bias_kv": True}
    options["of_heads"] = ("sinks", "alibi_slopes") if back_end == "reference" else ()
    calls = [make_arguments(seed=seed, **options) for seed in (0, 1)]
    with fused_mha.backend(back_end):
        expected = [fused_mha.attention(**call, is_causal=True).output for call in calls]
        monkeypatch.setattr("fused_mha.core.attention.check_attention", None)
        found = [fused_mha.attention(**call, is_causal=True).output for call in calls]
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(*expected)


def test_calls_after_a_first_one_in_inference_mode_have_one():
    memory.plain_keys.cache_clear()
    arguments = make_arguments(padding_dtype=torch.bool)
    with torch.inference_mode():
        assert kind_of(**arguments) is not None
        assert kind_of(**make_arguments()) is not None
    assert kind_of(**arguments) is not None


def test_tensors_of_a_class_of_their_own_have_none():
    class Named(torch.Tensor):
        pass

    arguments = make_arguments(padding_dtype=torch.bool)
    for name, x in arguments.items():
        assert kind_of(**arguments | {name: x.as_subclass(Named)}) is None
        assert kind_of(**arguments | {name: x.to("meta")}) is None
    assert kind_of(**arguments | {"query": torch.nn.Parameter(arguments["query"])}) is not None


def test_tensors_that_are_more_than_memory_have_none():
    arguments = make_arguments()
    query = arguments["query"]
    negated = torch.complex(query, query).conj().imag
    assert negated.is_neg()
    for x in (negated, query.to_sparse(), torch._to_functional_tensor(query)):
        assert kind_of(**arguments | {"query": x}) is None


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask", "bias_k", "bias_v"])
def test_masks_and_biases_that_need_a_gradient_have_none(name):
    arguments = make_arguments(mask_dtype=torch.float32, padding_dtype=torch.float32, bias_kv=True)
    arguments[name].requires_grad_()
    assert kind_of(**arguments) is None
    with torch.no_grad():
        assert kind_of(**arguments) is not None


def test_sinks_and_slopes_that_need_a_gradient_have_one():
    arguments = make_arguments(of_heads=("sinks", "alibi_slopes"))
    for name in ("sinks", "alibi_slopes"):
        arguments[name].requires_grad_()
    assert kind_of(**arguments) is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_modes_and_transforms_have_none():
    arguments = make_arguments()
    kinds = []

    def note(query):
        kinds.append(kind_of(**arguments | {"query": query}))
        return query.sum()

    torch.func.grad(note)(arguments["query"])
    torch.func.vmap(note)(arguments["query"][None])
    with forward_ad.dual_level():
        note(arguments["query"])
    with FlopCounterMode(display=False):
        note(arguments["query"])
    torch.jit.trace(note, arguments["query"], check_trace=False)
    assert kinds == [None] * 5


def test_a_compiled_call_asks_for_none(monkeypatch, in_general):
    def ask(*_):
        raise AssertionError("asked")

    arguments = make_arguments(padding_dtype=torch.bool)
    expected = in_general(**arguments).output
    fused_mha.attention(**arguments)
    monkeypatch.setattr(plans, "kind_of", ask)
    torch._dynamo.reset()
    found = torch.compile(fused_mha.attention, backend="aot_eager", fullgraph=True)(**arguments).output
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flag", [{"window": [3, 3]}, {"scale": torch.tensor(0.5)}], ids=["list", "tensor"])
def test_flags_that_may_change_are_not_kept(flag):
    arguments = make_arguments(**flag)
    for _ in range(2):
        assert fused_mha.attention(**arguments).output.isfinite().all()
    assert not plans._kept


def test_they_do_not_pile_up(launches, monkeypatch):
    monkeypatch.setattr(plans, "MOST_KINDS", 3)
    for S in range(1, 9):
        fused_mha.attention(**make_arguments(S=S))
        assert len(plans._kept) <= 3
    assert plans._kept


def test_they_hold_no_tensor():
    arguments = make_arguments(mask_dtype=torch.bool, padding_dtype=torch.bool)
    fused_mha.attention(**arguments)
    held = [weakref.ref(x) for x in arguments.values()]
    del arguments
    gc.collect()
    assert plans._kept
    assert [x() for x in held] == [None] * 5


@pytest.mark.parametrize("has_guards", [True, False])
def test_a_kind_is_found_again_by_the_guards_or_made_up_anew(has_guards, monkeypatch):
    if not has_guards:
        monkeypatch.setattr(memory, "_TensorGuards", None)
    arguments = make_arguments(padding_dtype=torch.bool, D=8, D_v=8)
    made_up, kind_of_tensors = [], plans.kind_of
    monkeypatch.setattr(plans, "kind_of", lambda *given: (made_up.append(given), kind_of_tensors(*given))[1])
    results = [fused_mha.attention(**arguments).output for _ in range(4)]
    assert all(torch.equal(x, results[0]) for x in results)
    assert len(made_up) == (2 if has_guards else 4)  # the second call notes what the first has kept


@pytest.mark.parametrize("shared", [("query", "key", "value"), ("key", "value"), ("query", "value"), ()], ids=str)
def test_which_tensors_are_one_is_of_no_account(shared):
    given = make_arguments(L=4, H=2, D=8, D_v=8)
    for name in shared:
        given[name] = given[shared[0]]
    expected = [fused_mha.attention(**given).output for _ in range(3)]
    other = {name: x.clone() for name, x in given.items()}
    for _ in range(3):
        assert torch.equal(fused_mha.attention(**other).output, expected[0])
        assert torch.equal(fused_mha.attention(**given).output, expected[0])


def test_the_same_tensor_is_another_mask_in_another_place(in_general):
    arguments = make_arguments(N=3, L=3, S=3, D=8, D_v=8)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    for name in ("attn_mask", "key_padding_mask") * 3:
        found, expected = (attend(**arguments, **{name: mask}).output for attend in (fused_mha.attention, in_general))
        assert torch.equal(found, expected)


def test_other_strides_dtypes_and_addresses_are_not_taken_for_a_recent_kind():
    arguments = make_arguments(N=4, L=4, H=4, H_kv=4, D=8, D_v=8)
    query = arguments["query"]
    moved = torch.cat([query.new_zeros(1), query.flatten()])[1:].view(query.shape)
    others = (query, query.transpose(1, 2), moved, query.to_sparse().to_dense())
    for x in others * 3:
        served, in_general = (fused_mha.attention(**arguments | {"query": y}).output for y in (x, x.clone()))
        assert torch.equal(served, in_general)
    with pytest.raises(RuntimeError, match="dtype"):
        fused_mha.attention(**arguments | {"query": query.half()})


def test_inference_mode_and_grad_mode_have_recent_kinds_of_their_own(monkeypatch):
    arguments = make_arguments(padding_dtype=torch.float32, D=8, D_v=8)
    arguments["key_padding_mask"].requires_grad_()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for _ in range(3):
                fused_mha.attention(**arguments)
    output = fused_mha.attention(**arguments).output
    assert torch.autograd.grad(output.sum(), arguments["key_padding_mask"])[0].any()


def test_a_backward_multiplies_as_its_forward_whenever_it_is_planned(launches):
    arguments = make_arguments(D=16, D_v=16, padding_dtype=torch.bool)
    arguments["query"].requires_grad_()
    output = fused_mha.attention(**arguments).output
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        torch.autograd.grad(output.sum(), arguments["query"])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    precisions = {kernel.fn.__name__: operands[-1].PRECISION for kernel, *_, operands in launches.by_triton}
    assert precisions == dict.fromkeys(("forward", "grad_query", "grad_key_value"), "ieee")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: x.transpose(1, 2),
        lambda x: x[:2],
        torch.Tensor.half,
        torch.Tensor.requires_grad_,
        torch._neg_view,
        torch.nn.Parameter,
    ],
    ids=["address", "strides", "sizes", "dtype", "need of a gradient", "negated", "type"],
)
def test_only_what_kernels_cannot_tell_apart_is_found(change):
    x, recent = torch.zeros(4, 4, 4), memory.Recent()
    recent.note([x, x.clone()], "found")
    assert recent.find([x.clone(), x.clone()]) == "found"
    assert recent.find([x.clone(), change(x.clone())]) is None


def test_the_last_four_kinds_are_known():
    kinds, recent = [torch.zeros(size) for size in range(1, 7)], memory.Recent()
    for i, x in enumerate(kinds):
        recent.note([x], i)
    assert [recent.find([x]) for x in kinds] == [None, None, 2, 3, 4, 5]

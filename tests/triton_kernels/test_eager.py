"""Eager calls that `plans` serves: by the same kernels with the same arguments as the general way, or by that."""

from types import SimpleNamespace

import pytest
import torch

import fused_mha
from attention_oracle import make_arguments
from fused_mha.core import plans
from fused_mha.module import one_call
from native.call_space import LAYOUTS, lay_out
from native.test_operators import operands
from test_functional_errors import BIAS_K, BIAS_V, KEY, QUERY, ROWS, VALUE
from triton_kernels.kinds import CASES, EVERYTHING, matches_oracle

pytest.importorskip("triton")
from fused_mha.backends.triton import eager, launch, launcher, preparation, readable

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

SIZES = {
    "even": {"N": 2, "L": 32, "S": 48, "H": 4, "H_kv": 2, "D": 16, "D_v": 8},
    "small": {"N": 1, "L": 5, "S": 9, "H": 1, "H_kv": 1, "D": 16, "D_v": 8},
    "odd": {"N": 3, "L": 5, "S": 7, "H": 2, "H_kv": 1, "D": 20, "D_v": 12},
}
LEAVES = ("query", "key", "value", "sinks", "alibi_slopes")
MASKS = {
    "padding": {"padding_dtype": torch.bool},
    "float padding": {"padding_dtype": torch.float16},
    "mask": {"mask_dtype": torch.bool},
    "float mask": {"mask_dtype": torch.float32},
    "mask of batch elements and heads": {"mask_dtype": torch.bool, "mask_shape": "NHLS"},
}


def with_masks_laid_out(arguments, layout):
    masks = {name: lay_out(x, layout) for name, x in arguments.items() if name in ("attn_mask", "key_padding_mask")}
    return arguments | masks


def kept_attention(**arguments):
    """`attention` of a kind that was kept before."""
    with torch.no_grad():
        fused_mha.attention(**arguments)
    count = len(plans._kept)
    assert count > 0
    results = fused_mha.attention(**arguments)
    assert len(plans._kept) == count
    return results


def described(x):
    """A tensor as a kernel sees it; where it lies, if it is one of the caller's."""
    if isinstance(x, torch.Tensor):
        return (x.dtype, x.shape, x.stride())
    return tuple(map(described, x)) if isinstance(x, tuple) else x


def compiled(**metadata):
    """What Triton returns of a launch."""
    usual = {"num_ctas": 1, "num_warps": 8, "shared": 4096, "global_scratch_size": 0, "profile_scratch_size": 0}
    return SimpleNamespace(function=77, metadata=SimpleNamespace(**usual | metadata))


def step(attention, arguments):
    """A forward and a backward, by all results."""
    torch.manual_seed(3)
    names = [name for name in LEAVES if name in arguments]
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    results = attention(**arguments | dict(zip(names, leaves, strict=True)))
    differentiable = [x for x in results if x is not None and x.requires_grad]
    return torch.autograd.grad([x.sum() for x in differentiable], leaves, allow_unused=True)


def seen(launches):
    """What is compared of launches, and how often a kernel was launched."""
    return [
        (kernel.fn.__name__, programs, how, tuple(map(described, call)), tuple(map(described, operands)))
        for kernel, programs, how, call, operands in launches.by_triton
    ]


@pytest.mark.parametrize("searched", [False, True], ids=["", "searched"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_kernels_are_launched_with_the_same_arguments(
    launches, in_general, monkeypatch, case, sizes, searched
):
    monkeypatch.setattr(preparation, "_pays_to_search", lambda *_: searched)
    arguments = make_arguments(**sizes | case, dtype=torch.float16)
    step(in_general, arguments)
    expected = seen(launches)
    assert len(expected) >= 3
    for _ in range(3):
        launches.by_triton.clear()
        step(fused_mha.attention, arguments)
        assert seen(launches) == expected
    assert len(plans._kept) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_kernels_are_launched_with_the_strides_of_the_tensors_they_are_given(launches, in_general, masks, layout):
    arguments = with_masks_laid_out(make_arguments(**SIZES["even"], **masks, dtype=torch.float16), layout)
    step(in_general, arguments)
    expected = seen(launches)
    launches.by_triton.clear()
    step(fused_mha.attention, arguments)
    assert seen(launches) == expected
    for _, _, _, call, _ in launches.by_triton:
        for i, x in enumerate((call.query, call.key, call.value)):
            first = launcher.TENSORS + 3 * i
            assert x.stride()[:3] == call[first : first + 3]
        if call.attn_mask is not None:
            assert readable.strides(call.attn_mask) == (call.mask_n, call.mask_h, call.mask_l)
        if call.padding is not None:
            assert call.padding.stride(0) == call.padding_n


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_gradients_beside_masks_in_any_memory(in_general, masks, layout):
    arguments = with_masks_laid_out(make_arguments(**SIZES["small"] | {"N": 2}, **masks), layout)
    assert all(map(torch.equal, step(kept_attention, arguments), step(in_general, arguments)))


@pytest.fixture
def addresses(monkeypatch):
    """Of each launch, its launcher, and the addresses of the call's tensors and of the operands, in one list."""
    found, alive = [], []  # what lives on gives no other tensor its address
    method = launcher.Launcher.__call__

    def call(self, tensors, operands):
        alive.append((tensors, operands))
        found.append((self, [x.data_ptr() for x in (*tensors, *operands) if x is not None]))
        return method(self, tensors, operands)

    monkeypatch.setattr(launcher.Launcher, "__call__", call)
    return found


@pytest.mark.parametrize("scratch", [2, 1, 0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_second_launch_gives_the_addresses_and_numbers_that_triton_was_given(launches, addresses, case, scratch):
    arguments = make_arguments(**SIZES["even"] | case, dtype=torch.float16)
    launches.compiled = compiled()
    for name in launcher._SCRATCH[scratch:]:  # older kernels have no such pointers
        delattr(launches.compiled.metadata, name)
    step(fused_mha.attention, arguments)
    assert not launches.by_address
    addresses.clear()
    step(fused_mha.attention, arguments)
    assert len(launches.by_triton) == len(launches.by_address) == len(addresses)
    rows = zip(launches.by_triton, launches.by_address, addresses, strict=True)
    for (kernel, programs, _, call, _), launched, (of, given) in rows:
        numbers = tuple(x for x in call[launcher.TENSORS :] if x is not None)
        assert of.kernel is kernel
        function, *grid, warps, shared, kinds, values, stream = launched
        assert (function, grid, warps, shared, stream) == (77, [programs, 1, 1], 8, 4096, 99)
        assert values == (*given, *numbers, *[None] * scratch)  # and no scratch memory
        of_numbers = "".join("f" if isinstance(x, float) else "i" for x in numbers)
        assert kinds == "O" * len(given) + of_numbers + "O" * scratch


def test_numbers_beyond_32_bits_are_launched_as_such():
    kinds = [launcher._kind(number) for number in (0, -1, (1 << 31) - 1, -(1 << 31), 1 << 31, -(1 << 31) - 1, 0.5)]
    assert kinds == ["i", "i", "i", "i", "l", "l", "f"]


@pytest.mark.parametrize(
    "missing", ["the launcher", "the stream", "a launch without scratch memory", "no enter hook", "no exit hook"]
)
def test_without_the_short_way_every_launch_is_tritons(launches, monkeypatch, missing):
    arguments = make_arguments(**SIZES["even"], padding_dtype=torch.bool, dtype=torch.float16)
    launches.compiled = compiled(global_scratch_size=128 * (missing == "a launch without scratch memory"))
    if missing == "the launcher":
        monkeypatch.setattr(launcher, "static_launch", None)
    if missing == "the stream":
        monkeypatch.setattr(launcher, "_current_stream", None)
    if missing.endswith("hook"):  # of a profiler
        hook = "launch_enter_hook" if "enter" in missing else "launch_exit_hook"
        monkeypatch.setattr(getattr(launcher.knobs.runtime, hook), "calls", [print])
    for _ in range(3):
        step(fused_mha.attention, arguments)
    assert len(launches.by_triton) == 3 * 3
    assert not launches.by_address


@pytest.mark.parametrize(
    ("sizes", "case"),
    [
        ("small", "averaged weights"),
        ("odd", "bool mask and padding"),
        ("small", "dropout"),
        ("odd", "softcap, sinks, ALiBi"),
    ],
)
def test_results_are_right(case, sizes):
    matches_oracle(kept_attention, make_arguments(**SIZES[sizes] | CASES[case]))


@pytest.mark.parametrize("options", [{}, CASES["softcap, sinks, ALiBi"]], ids=["plain", "options"])
def test_results_are_the_bits_of_the_general_way(in_general, options):
    arguments = make_arguments(**SIZES["odd"], padding_dtype=torch.float32, **EVERYTHING | options)
    found, expected = (step(attention, arguments) for attention in (kept_attention, in_general))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("learns", [False, True])
def test_the_gradient_of_slopes_that_learn_alone_is_computed(launches, learns):
    arguments = make_arguments(**SIZES["small"], of_heads=("sinks", "alibi_slopes"))
    for name in ("query", "sinks"):
        arguments[name].requires_grad_()
    arguments["alibi_slopes"].requires_grad_(learns)
    fused_mha.attention(**arguments).output.sum().backward()
    _, (_, grad_query, grad_sinks, grad_slopes, _) = launches.by_triton[1][3:]
    assert grad_query.shape == arguments["query"].shape
    assert grad_sinks.shape == (1, 1, 1)
    assert (grad_slopes is not None) == learns


def test_a_mask_that_is_filled_anew_before_the_backward_changes_nothing(in_general):
    arguments = make_arguments(**SIZES["small"], mask_dtype=torch.bool, padding_dtype=torch.bool)

    def spoiled(**arguments):
        masks = {name: arguments[name].clone() for name in ("attn_mask", "key_padding_mask")}
        results = kept_attention(**arguments | masks)
        for mask in masks.values():
            mask.logical_not_()
        return results

    assert all(map(torch.equal, step(spoiled, arguments), step(in_general, arguments)))


@pytest.mark.parametrize(
    ("wanted", "of_heads"),
    [
        *(("query", ()), ("key", ()), ("value", ()), ("value", LEAVES[3:])),
        *((name, of_heads) for name in LEAVES[3:] for of_heads in ((name,), LEAVES[3:])),
    ],
    ids=str,
)
@pytest.mark.parametrize("through", ["output", "weights", "lse"])
def test_gradients_of_one_input_by_one_result(in_general, wanted, through, of_heads):
    arguments = make_arguments(**SIZES["small"], **EVERYTHING, of_heads=of_heads)

    def gradient(attention):
        leaf = arguments[wanted].detach().requires_grad_()
        result = getattr(attention(**arguments | {wanted: leaf}), through)
        return torch.autograd.grad(result.square().sum(), leaf)[0] if result.requires_grad else None

    found, expected = gradient(kept_attention), gradient(in_general)
    assert (found is None) == (expected is None) == (wanted == "value" and through != "output")
    assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("name", ["query", "sinks", "alibi_slopes"])
def test_second_derivatives_go_by_the_reference(in_general, name):
    arguments = make_arguments(**SIZES["small"], padding_dtype=torch.bool, of_heads=("sinks", "alibi_slopes"))

    def second(attention):
        leaf = arguments[name].detach().requires_grad_()
        output = attention(**arguments | {name: leaf}).output
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(second(kept_attention), second(in_general))


def packed_views():
    """Arguments whose query, key and value are views of one projection."""
    arguments = make_arguments(N=2, L=5, S=5, H=2, H_kv=2, D=16, D_v=16, padding_dtype=torch.bool, need_weights=True)
    projected = torch.stack([arguments[name] for name in ("query", "key", "value")], dim=2)
    return arguments | dict(zip(("query", "key", "value"), projected.unbind(2), strict=True))


def negated(x):
    """The same tensor, of which torch has noted that the memory holds its negative."""
    return torch._neg_view(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(-x))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (torch.clone, lambda x: x),
        (lambda x: x.double() if x.is_floating_point() else x, lambda x: x.float() if x.is_floating_point() else x),
        (lambda x: x, lambda x: negated(x) if x.is_floating_point() else x),
    ],
    ids=["clone", "another dtype", "negated"],
)
def test_hooks_see_what_is_saved(in_general, pack, unpack):
    arguments, packed, unpacked = packed_views(), [], []
    step(kept_attention, arguments)  # the next backward is looked up beside this one

    def packs(x):
        packed.append(x.shape)
        return pack(x.detach())

    def unpacks(x):
        unpacked.append(x)
        return unpack(x)

    with torch.autograd.graph.saved_tensors_hooks(packs, unpacks):
        gradients = step(kept_attention, arguments)
    assert len(packed) == len(unpacked) == 6  # query, key, value, padding, output and statistics
    for found, expected in zip(gradients, step(in_general, arguments), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5], ids=["query", "key", "value", "padding", "output", "stats"])
def test_tensors_of_another_dtype_are_launched_by_no_plan(which):
    arguments, saved = packed_views(), []
    step(kept_attention, arguments)

    def unpack(x):
        saved.append(x)
        return x.half() if len(saved) == which + 1 else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Plan, "gradients", None)
        patch.setattr("fused_mha.ops.schema.attention_backward", lambda *_: (None,) * 3)
        step(kept_attention, arguments)


def test_a_backward_of_a_kind_that_came_before_is_looked_up(monkeypatch):
    arguments = packed_views()
    expected = step(kept_attention, arguments)
    with monkeypatch.context() as patch:
        patch.setattr(eager.Kept, "_plan_of_saved", None)
        found = step(kept_attention, arguments)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("is_given", [(True, False), (False, True), (True, True)], ids=str)
def test_which_results_have_gradients_makes_backwards_of_other_kinds(in_general, is_given):
    """Both gradients have one shape, so that nothing else tells them apart."""
    arguments = make_arguments(N=1, L=2, S=2, H=2, H_kv=2, D=2, D_v=2)
    leaves = [arguments[name].requires_grad_() for name in LEAVES[:3]]

    def gradients(attention, given):
        results = attention(**arguments, need_weights=True, average_attn_weights=False)[:2]
        used = [x for x, wanted in zip(results, given, strict=True) if wanted]
        return torch.autograd.grad([x.square().sum() for x in used], leaves, allow_unused=True)

    for given in ((True, False), (False, True), (True, True)) * 2:  # every kind of them has been seen
        gradients(kept_attention, given)
    for found, expected in zip(gradients(kept_attention, is_given), gradients(in_general, is_given), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_a_leaf_may_be_laid_out_anew_before_the_backward(in_general):
    arguments = packed_views()
    step(kept_attention, arguments)

    def gradient(attention):
        leaf = arguments["query"].detach().requires_grad_()
        output = attention(**arguments | {"query": leaf}).output
        leaf.data = leaf.data.contiguous()
        return torch.autograd.grad(output.square().sum(), leaf)[0]

    torch.testing.assert_close(gradient(kept_attention), gradient(in_general))


def test_the_operators_keep_their_plans_too(launches, monkeypatch):
    monkeypatch.setattr(launch, "MOST_PLANS", 2)
    for S, count in ((5, 1), (5, 1), (6, 2), (6, 2), (7, 1)):
        arguments = operands(S=S)
        output, _, _, stats = launch.attention(*arguments)
        launch.attention_backward(output, None, None, output, stats, False, False, *arguments)
        assert len(launch._plans) == count
    assert len(launches.by_triton) == 5 * 3


@pytest.mark.parametrize("name", launch._GIVEN)
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda x: x[..., :-1], lambda x: x.to("meta")])
def test_a_backward_is_given_what_the_forward_gave(launches, name, change):
    arguments = operands(need_weights=True)
    output, weights, lse, stats = launch.attention(*arguments)
    given = dict(zip(launch._GIVEN, (output, weights, lse, output, stats), strict=True))
    launch.attention_backward(*given.values(), False, False, *arguments)
    x = given[name]
    found = change(x)
    with pytest.raises(RuntimeError) as caught:
        launch.attention_backward(*(given | {name: found}).values(), False, False, *arguments)
    texts = [f"{tuple(of.shape)} of {of.dtype} on {of.device}" for of in (x, found)]
    assert str(caught.value) == f"{name} must be {texts[0]}; got {texts[1]}"


def test_autocast_casts_first(in_general):
    arguments = make_arguments(**SIZES["small"], padding_dtype=torch.bool)
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            found, expected = fused_mha.attention(**arguments).output, in_general(**arguments).output
        assert found.dtype == torch.float16
        assert torch.equal(found, expected)
    assert len(plans._kept) == 1


@pytest.mark.parametrize(("wrong", "exception", "text"), ROWS)
def test_mistakes_are_seen_beside_a_kept_kind(launches, wrong, exception, text):
    right = {"query": QUERY, "key": KEY, "value": VALUE}
    for more in ({}, {"bias_k": BIAS_K, "bias_v": BIAS_V}):
        fused_mha.attention(**right | more)
    assert len(plans._kept) == 2
    for _ in range(2):
        with pytest.raises(exception) as caught:
            fused_mha.attention(**right | wrong)
        assert str(caught.value) == text


def test_the_module_goes_the_short_way(launches):
    module = fused_mha.MultiHeadAttention(16, 4, batch_first=True)
    x, padding = torch.randn(2, 8, 16), torch.zeros(2, 8, dtype=torch.bool)
    with fused_mha.backend("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_mha.module.one_call.forward", lambda *_, **__: None)
        for _ in range(3):
            module(x, x, x, key_padding_mask=padding)
    assert [type(served) for served in plans._kept.values()].count(eager.Kept) == 1
    assert list(plans._kept.values()).count(one_call._BY_STEPS) == 1  # the back end serves no whole module

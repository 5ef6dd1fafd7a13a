"""Eager calls that `plans` serves: by the same kernels with the same arguments as the general way, or by that."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fused_mha
from attention_oracle import make_arguments
from fused_mha import dispatch, plans
from native.test_operators import operands
from test_functional_errors import BIAS_K, BIAS_V, KEY, QUERY, ROWS, VALUE
from triton_kernels.kinds import CASES, EVERYTHING, matches_oracle

pytest.importorskip("triton")
from fused_mha.backends import cpu, triton
from fused_mha.backends.triton import launch, launcher, preparation

SIZES = {
    "even": {"N": 2, "L": 32, "S": 48, "H": 4, "H_kv": 2, "D": 16, "D_v": 8},
    "small": {"N": 1, "L": 5, "S": 9, "H": 1, "H_kv": 1, "D": 16, "D_v": 8},
    "odd": {"N": 3, "L": 5, "S": 7, "H": 2, "H_kv": 1, "D": 20, "D_v": 12},
}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Tensors of the CPU stand for those of a GPU: the CPU's back end has the kernels and the plans of `triton`."""
    if torch.cuda.is_available():
        pytest.skip("tests/cuda calls the kernels on the GPU")
    stands_in = cpu.BACKEND._replace(served=triton.BACKEND.served, leaves=lambda _: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (stands_in, *dispatch.BACKENDS[1:]))
    monkeypatch.setattr(cpu, "_forward", launch.attention)
    monkeypatch.setattr(cpu, "_backward", launch.attention_backward)
    monkeypatch.setattr(plans, "DEVICE", "cpu")
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def in_general(monkeypatch):
    """`attention` by the general way."""

    def attention(**arguments):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "DEVICE", "cuda")
            return fused_mha.attention(**arguments)

    return attention


def kind_of(**arguments):
    """That of a call; None where it goes the general way."""
    names = ("query", "key", "value", "attn_mask", "key_padding_mask", "bias_k", "bias_v")
    return plans.kind_of(tuple(map(arguments.get, names)), ("top_left", False))


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
        return (x.dtype, x.numel(), x.stride()[-1:])
    return tuple(map(described, x)) if isinstance(x, tuple) else x


def flat(operands):
    for x in operands:
        if isinstance(x, tuple):
            yield from flat(x)
        elif x is not None:
            yield x


@pytest.fixture
def launches(monkeypatch):
    """What `launcher.run` and `static_launch` are given; the first returns `compiled`."""
    found = SimpleNamespace(by_triton=[], by_address=[], compiled=None)

    def run(kernel, programs, how, call, *operands_and_tile):
        found.by_triton.append((kernel, programs, how, call, operands_and_tile))
        return found.compiled

    monkeypatch.setattr(launcher, "run", run)
    monkeypatch.setattr(launcher, "static_launch", lambda *arguments: found.by_address.append(arguments))
    monkeypatch.setattr(launcher, "_current_stream", lambda device: 100 + device)
    return found


def compiled(**metadata):
    """What Triton returns of a launch."""
    usual = {"num_ctas": 1, "num_warps": 8, "shared": 4096, "global_scratch_size": 0, "profile_scratch_size": 0}
    return SimpleNamespace(function=77, metadata=SimpleNamespace(**usual | metadata))


def step(attention, arguments):
    """A forward and a backward, by all results."""
    torch.manual_seed(3)
    leaves = [arguments[name].detach().requires_grad_() for name in ("query", "key", "value")]
    results = attention(**arguments | dict(zip(("query", "key", "value"), leaves, strict=True)))
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


@pytest.fixture
def addresses(monkeypatch):
    """Of each launch, its launcher, and the addresses of the call's tensors and of the operands."""
    found, alive = [], []  # what lives on gives no other tensor its address
    method = launcher.Launcher.__call__

    def call(self, tensors, *operands):
        alive.append((tensors, operands))
        found.append((self, *([x.data_ptr() for x in flat(of)] for of in (tensors, operands))))
        return method(self, tensors, *operands)

    monkeypatch.setattr(launcher.Launcher, "__call__", call)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_second_launch_gives_the_addresses_and_numbers_that_triton_was_given(launches, addresses, case):
    arguments = make_arguments(**SIZES["even"] | case, dtype=torch.float16)
    launches.compiled = compiled()
    step(fused_mha.attention, arguments)
    assert not launches.by_address
    addresses.clear()
    step(fused_mha.attention, arguments)
    assert len(launches.by_triton) == len(launches.by_address) == len(addresses)
    rows = zip(launches.by_triton, launches.by_address, addresses, strict=True)
    for (kernel, programs, _, call, _), launched, (of, tensors, others) in rows:
        numbers = call[launcher.TENSORS :]
        assert of.kernel is kernel
        function, *grid, warps, shared, kinds, values, stream = launched
        assert (function, grid, warps, shared, stream) == (77, [programs, 1, 1], 8, 4096, 99)
        assert values == (*tensors, *numbers, *others, None, None)  # and no scratch memory
        of_numbers = "".join("f" if isinstance(x, float) else "i" for x in numbers)
        assert kinds == "O" * len(tensors) + of_numbers + "O" * (len(others) + 2)


def test_numbers_beyond_32_bits_are_launched_as_such():
    kinds = [launcher._kind(number) for number in (0, -1, (1 << 31) - 1, -(1 << 31), 1 << 31, -(1 << 31) - 1, 0.5)]
    assert kinds == ["i", "i", "i", "i", "l", "l", "f"]


@pytest.mark.parametrize("missing", ["the launcher", "a launch without scratch memory", "no profiler"])
def test_without_the_short_way_every_launch_is_tritons(launches, monkeypatch, missing):
    arguments = make_arguments(**SIZES["even"], padding_dtype=torch.bool, dtype=torch.float16)
    launches.compiled = compiled(global_scratch_size=128 * (missing == "a launch without scratch memory"))
    if missing == "the launcher":
        monkeypatch.setattr(launcher, "static_launch", None)
    if missing == "no profiler":
        monkeypatch.setattr(launcher.knobs.runtime.launch_enter_hook, "calls", [print])
    for _ in range(3):
        step(fused_mha.attention, arguments)
    assert len(launches.by_triton) == 3 * 3
    assert not launches.by_address


@pytest.mark.parametrize(
    ("sizes", "case"), [("small", "averaged weights"), ("odd", "bool mask and padding"), ("small", "dropout")]
)
def test_results_are_right(case, sizes):
    matches_oracle(kept_attention, make_arguments(**SIZES[sizes] | CASES[case]))


def test_results_are_the_bits_of_the_general_way(in_general):
    arguments = make_arguments(**SIZES["odd"], padding_dtype=torch.float32, **EVERYTHING)
    found, expected = (step(attention, arguments) for attention in (kept_attention, in_general))
    assert all(map(torch.equal, found, expected))


def test_a_mask_that_is_filled_anew_before_the_backward_changes_nothing(in_general):
    arguments = make_arguments(**SIZES["small"], mask_dtype=torch.bool, padding_dtype=torch.bool)

    def spoiled(**arguments):
        masks = {name: arguments[name].clone() for name in ("attn_mask", "key_padding_mask")}
        results = kept_attention(**arguments | masks)
        for mask in masks.values():
            mask.logical_not_()
        return results

    assert all(map(torch.equal, step(spoiled, arguments), step(in_general, arguments)))


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
@pytest.mark.parametrize("through", ["output", "weights", "lse"])
def test_gradients_of_one_input_by_one_result(in_general, wanted, through):
    arguments = make_arguments(**SIZES["small"], **EVERYTHING)

    def gradient(attention):
        leaf = arguments[wanted].detach().requires_grad_()
        result = getattr(attention(**arguments | {wanted: leaf}), through)
        return torch.autograd.grad(result.square().sum(), leaf)[0] if result.requires_grad else None

    found, expected = gradient(kept_attention), gradient(in_general)
    assert (found is None) == (expected is None) == (wanted == "value" and through != "output")
    assert found is None or torch.equal(found, expected)


def test_second_derivatives_go_by_the_reference(in_general):
    arguments = make_arguments(**SIZES["small"], padding_dtype=torch.bool)

    def second(attention):
        leaf = arguments["query"].detach().requires_grad_()
        output = attention(**arguments | {"query": leaf}).output
        (first,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(second(kept_attention), second(in_general))


def test_hooks_see_what_is_saved():
    arguments = make_arguments(**SIZES["small"], padding_dtype=torch.bool)
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gradients = step(kept_attention, arguments)
    assert len(packed) == 6  # query, key, value, padding, output and statistics
    assert all(map(torch.equal, gradients, step(kept_attention, arguments)))


class TestKinds:
    """What has none, and what makes two of them."""

    def test_calls_that_differ_by_values_alone_are_of_one(self):
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
        ],
        ids=str,
    )
    def test_sizes_dtypes_and_masks_make_others(self, other):
        assert kind_of(**make_arguments()) != kind_of(**make_arguments(**other))

    def test_strides_and_addresses_make_others(self):
        arguments = make_arguments(D=8)
        query = arguments["query"]
        strided = query.transpose(1, 2).contiguous().transpose(1, 2)
        moved = torch.cat([query.new_zeros(1), query.flatten()])[1:].view(query.shape)
        kinds = [kind_of(**arguments | {"query": x}) for x in (query, strided, moved)]
        assert len(set(kinds)) == 3

    def test_every_flag_makes_another(self, launches):
        flags = [
            {},
            {"is_causal": True},
            {"causal_alignment": "bottom_right"},
            {"window": (3, None)},
            {"add_zero_attn": True},
            {"dropout_p": 0.5},
            {"scale": 0.3},
            {"need_weights": True},
            {"average_attn_weights": False},
            {"return_lse": True},
        ]
        arguments = make_arguments()
        for count, given in enumerate(flags, 1):
            fused_mha.attention(**arguments, **given)
            assert len(plans._kept) == count
        with fused_mha.backend("cpu"):
            fused_mha.attention(**arguments)
        assert len(plans._kept) == len(flags) + 1

    def test_a_forced_back_end_serves(self, launches):
        arguments = make_arguments()
        fused_mha.attention(**arguments)
        launches.by_triton.clear()
        with fused_mha.backend("reference"):
            assert fused_mha.attention(**arguments).output.isfinite().all()
        assert not launches.by_triton

    def test_tensors_of_a_class_of_their_own_have_none(self):
        class Named(torch.Tensor):
            pass

        arguments = make_arguments(padding_dtype=torch.bool)
        for name, x in arguments.items():
            assert kind_of(**arguments | {name: x.as_subclass(Named)}) is None
            assert kind_of(**arguments | {name: x.to("meta")}) is None
        assert kind_of(**arguments | {"query": torch.nn.Parameter(arguments["query"])}) is not None

    def test_tensors_that_are_more_than_memory_have_none(self):
        arguments = make_arguments()
        query = arguments["query"]
        negated = torch.complex(query, query).conj().imag
        assert negated.is_neg()
        for x in (negated, query.to_sparse(), torch._to_functional_tensor(query)):
            assert kind_of(**arguments | {"query": x}) is None

    @pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask", "bias_k", "bias_v"])
    def test_masks_and_biases_that_need_a_gradient_have_none(self, name):
        arguments = make_arguments(mask_dtype=torch.float32, padding_dtype=torch.float32, bias_kv=True)
        arguments[name].requires_grad_()
        assert kind_of(**arguments) is None
        with torch.no_grad():
            assert kind_of(**arguments) is not None

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
    def test_modes_and_transforms_have_none(self):
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

    def test_a_compiled_call_asks_for_none(self, monkeypatch, in_general):
        def ask(*_):
            raise AssertionError("asked")

        arguments = make_arguments(padding_dtype=torch.bool)
        expected = in_general(**arguments).output
        kept_attention(**arguments)
        monkeypatch.setattr(plans, "kind_of", ask)
        torch._dynamo.reset()
        found = torch.compile(fused_mha.attention, backend="aot_eager", fullgraph=True)(**arguments).output
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("flag", [{"window": [3, 3]}, {"scale": torch.tensor(0.5)}], ids=["list", "tensor"])
    def test_flags_that_may_change_are_not_kept(self, flag):
        arguments = make_arguments(**flag)
        for _ in range(2):
            assert fused_mha.attention(**arguments).output.isfinite().all()
        assert not plans._kept

    def test_they_do_not_pile_up(self, launches, monkeypatch):
        monkeypatch.setattr(plans, "MOST_KINDS", 3)
        for S in range(1, 9):
            fused_mha.attention(**make_arguments(S=S))
            assert len(plans._kept) <= 3
        assert plans._kept

    def test_they_hold_no_tensor(self):
        arguments = make_arguments(**SIZES["small"], mask_dtype=torch.bool, padding_dtype=torch.bool)
        step(kept_attention, arguments)
        held = [weakref.ref(x) for x in arguments.values()]
        del arguments
        gc.collect()
        assert plans._kept
        assert [x() for x in held] == [None] * 5


def test_the_operators_keep_their_plans_too(launches, monkeypatch):
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "MOST_PLANS", 2)
    monkeypatch.setattr(launch, "_plans", {})
    for S, count in ((5, 1), (5, 1), (6, 2), (6, 2), (7, 1)):
        arguments = operands(S=S)
        output, _, _, stats = launch.attention(*arguments)
        launch.attention_backward(output, None, None, output, stats, False, False, *arguments)
        assert len(launch._plans) == count
    assert len(launches.by_triton) == 5 * 3


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
    for _ in range(2):
        with pytest.raises(exception) as caught:
            fused_mha.attention(**right | wrong)
        assert str(caught.value) == text


def test_the_module_goes_the_short_way(launches):
    module = fused_mha.MultiHeadAttention(16, 4, batch_first=True)
    x, padding = torch.randn(2, 8, 16), torch.zeros(2, 8, dtype=torch.bool)
    with fused_mha.backend("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_mha.one_call.forward", lambda *_: None)
        for _ in range(3):
            module(x, x, x, key_padding_mask=padding)
    assert len(plans._kept) == 1

"""`scaled_dot_product_attention` has torch's meaning and gradients; `serve_sdpa` sends the process's calls to it."""

import contextlib
import re
import sys
import threading
from types import ModuleType

import pytest
import torch
import torch._dynamo.testing
import torch.fx
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_mha
from fused_mha import serve_sdpa
from fused_mha.backends import cpu
from fused_mha.integrations import sdpa
from fused_mha.testing import assert_parity
from fused_mha.testing.strategies import DTYPES, seeds, sizes

TORCH = F.scaled_dot_product_attention
needs_library = pytest.mark.skipif(cpu.LIBRARY is None, reason="this installation has no C++ library")


class Call(nn.Module):
    """A function as a module, for the parity kit."""

    def __init__(self, function, **flags):
        super().__init__()
        self.function, self.flags = function, flags

    def forward(self, query, key, value, attn_mask=None):
        return self.function(query, key, value, attn_mask=attn_mask, **self.flags)


@pytest.fixture(autouse=True)
def torchs_own_afterwards():
    serve_sdpa.report(clear=True)
    yield
    serve_sdpa.off()
    assert F.scaled_dot_product_attention is TORCH


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@st.composite
def calls(draw):
    """Shapes of query, key and value, the mask's shape and kind, and flags: all that the core may serve."""
    N, L, S, H_kv = draw(sizes(1)), draw(sizes(1)), draw(sizes(1)), draw(st.integers(1, 3))
    D, D_v = draw(st.integers(4, 20)), draw(st.integers(4, 20))
    has_heads = draw(st.booleans()) or draw(st.booleans())
    groups = draw(st.integers(1, 3)) if has_heads else 1
    before = (N, H_kv * groups) if has_heads else (N,)
    before_keys = (N, H_kv) if has_heads else (N,)
    kind = draw(st.sampled_from((None, "bool", "float", "causal")))
    mask = None
    if kind in ("bool", "float"):
        full = (*before, L, S)
        dims = draw(st.integers(2, len(full)))
        mask = [draw(st.sampled_from((size, size, 1))) for size in full[-dims:]]
    flags = {
        "is_causal": kind == "causal",
        "enable_gqa": groups > 1 or (has_heads and draw(st.booleans())),
        "scale": draw(st.sampled_from((None, 0.3, 1.0))),
    }
    shapes = ((*before, L, D), (*before_keys, S, D), (*before_keys, S, D_v))
    return shapes, mask, kind, flags, draw(st.sampled_from(DTYPES))


@needs_library
@given(call=calls(), seed=seeds, requires_grad=st.booleans())
@example(call=(((2, 5, 8),) * 3, [2, 5, 5], "bool", {}, torch.float32), seed=0, requires_grad=False)
@example(call=(((1, 2, 3, 4),) * 3, [3, 1], "float", {}, torch.float64), seed=0, requires_grad=True)
def test_any_call_agrees_with_torch_on_the_fused_core(call, seed, requires_grad):
    shapes, mask_shape, kind, flags, dtype = call
    query, key, value = tensors(*shapes, dtype=dtype, seed=seed)
    mask = None
    if kind == "bool":
        mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        mask[..., :1] = True  # of the gradients of rows that see nothing, torch's are NaN on some of its ways
    elif kind == "float":
        (mask,) = tensors(mask_shape, dtype=dtype, seed=seed + 1)
        mask.requires_grad_(requires_grad)
    with fused_mha.backend("cpu"):
        assert not isinstance(sdpa.inputs_of(query, key, value, mask, **flags), str)
        assert_parity(
            Call(fused_mha.scaled_dot_product_attention, **flags),
            Call(TORCH, **flags),
            query,
            key,
            value,
            seed=seed,
            attn_mask=mask,
        )


def test_a_query_that_sees_no_key_gets_zeros_as_in_torch():
    query, key, value = tensors(*[(1, 2, 300, 64)] * 3)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    mask[7] = False
    output = fused_mha.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(output[:, :, 7], torch.zeros(1, 2, 64))
    torch.testing.assert_close(output, TORCH(query, key, value, mask))


def test_dropout_drops_its_share():
    query, key = torch.zeros(2, 1, 2, 700, 64)
    value = torch.ones(1, 2, 700, 64)
    output = fused_mha.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    assert abs(output.mean().item() - 1.0) < 0.01
    assert output.std().item() > 0.01


def test_autocast_casts_as_torch_does():
    query, key, value = tensors(*[(2, 4, 100, 64)] * 3)
    with torch.autocast("cpu", torch.bfloat16), fused_mha.backend("cpu"):
        ours = fused_mha.scaled_dot_product_attention(query, key, value)
        theirs = TORCH(query, key, value)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


q4, k3 = (2, 4, 5, 8), (2, 5, 8)


class Causal(nn.Module):
    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


POSITION = re.compile(r" \(position \d\)")  # of an argument that is given by position
TORCHS = {
    "2-D": ([(5, 8)] * 3, {}),
    "5-D": ([(1, *q4)] * 3, {}),
    "empty": ([(2, 4, 0, 8), q4, q4], {}),
    "a batch that broadcasts": ([q4, (1, 4, 5, 8), (1, 4, 5, 8)], {}),
    "heads without enable_gqa": ([q4, (2, 1, 5, 8), (2, 1, 5, 8)], {}),
    "mask and is_causal": ([q4] * 3, {"attn_mask": torch.zeros(5, 5), "is_causal": True}),
    "mask of one dimension": ([q4] * 3, {"attn_mask": torch.zeros(5)}),
    "mask of another dtype": ([q4] * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}),
    "mask of another size": ([q4] * 3, {"attn_mask": torch.zeros(5, 6)}),
    "mask that is no tensor": ([q4] * 3, {"attn_mask": [[0.0] * 5] * 5}),
    "another head size": ([q4, (2, 4, 5, 9), q4], {}),
    "a flag that is a number": ([q4] * 3, {"is_causal": 1}),
    "dropout that is no number": ([q4] * 3, {"dropout_p": "a"}),
    "dropout of 2": ([q4] * 3, {"dropout_p": 2.0}),
    "heads that do not divide": ([q4, (2, 3, 5, 8), (2, 3, 5, 8)], {"enable_gqa": True}),
}


@needs_library
@pytest.mark.parametrize(("shapes", "arguments"), TORCHS.values(), ids=TORCHS)
def test_what_the_core_does_not_serve_is_torchs_with_torchs_error(shapes, arguments):
    def outcome(function):
        try:
            return function(*tensors(*shapes), **arguments)
        except Exception as error:
            return error

    with serve_sdpa(), fused_mha.backend("cpu"):  # or small calls would be torch's anyhow
        results = [outcome(f) for f in (TORCH, F.scaled_dot_product_attention, fused_mha.scaled_dot_product_attention)]
    assert serve_sdpa.report().served == 0
    theirs, *ours = results
    for own in ours:
        if isinstance(theirs, Exception):
            assert (type(own), POSITION.sub("", str(own))) == (type(theirs), POSITION.sub("", str(theirs)))
        else:
            assert torch.equal(own, theirs)


@pytest.mark.parametrize("given", [(None, 1, 2), (torch.zeros(q4), 1, 2)], ids=["None", "numbers"])
def test_what_is_no_tensor_is_torchs_type_error(given):
    with serve_sdpa():
        for function in (F.scaled_dot_product_attention, fused_mha.scaled_dot_product_attention):
            with pytest.raises(TypeError, match="must be Tensor"):
                function(*given)


LARGE = (1, 4, 256, 64)


@needs_library
class TestServeSDPA:
    def test_serves_and_counts(self):
        query, key, value = tensors(*[LARGE] * 3)
        with serve_sdpa():
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            nn.functional.scaled_dot_product_attention(*tensors(*[q4] * 3))
        torch.testing.assert_close(output, TORCH(query, key, value, is_causal=True))
        report = serve_sdpa.report(clear=True)
        assert report == (1, {"a call so small takes torch less time": 1})
        assert str(report) == "served 1, left to torch 1\n         1  a call so small takes torch less time"
        assert serve_sdpa.report() == (0, {})

    def test_a_model_that_was_not_written_for_it(self):
        layer = nn.TransformerEncoderLayer(256, 4, 256, dropout=0.0, batch_first=True)
        x = torch.randn(2, 256, 256)
        expected = layer(x)
        with serve_sdpa():
            output = layer(x)
        assert serve_sdpa.report() == (1, {})
        torch.testing.assert_close(output, expected)

    def test_contexts_nest_and_decorate(self):
        @serve_sdpa()
        def inside():
            return F.scaled_dot_product_attention

        with serve_sdpa():
            serving = F.scaled_dot_product_attention
            with serve_sdpa():
                assert F.scaled_dot_product_attention is serving is not TORCH
            assert F.scaled_dot_product_attention is serving
        assert F.scaled_dot_product_attention is TORCH
        assert inside() is serving
        assert F.scaled_dot_product_attention is TORCH

    def test_an_exception_ends_it(self):
        with pytest.raises(OSError, match="no weights"), serve_sdpa():
            raise OSError("no weights")
        assert F.scaled_dot_product_attention is TORCH

    def test_the_switch_outlasts_contexts(self):
        serve_sdpa.on()
        with serve_sdpa():
            pass
        assert F.scaled_dot_product_attention is not TORCH
        serve_sdpa.off()
        assert F.scaled_dot_product_attention is TORCH

    def test_modules_that_imported_the_function_by_name(self, monkeypatch):
        other = ModuleType("other")
        other.scaled_dot_product_attention = TORCH
        monkeypatch.setitem(sys.modules, "other", other)
        with serve_sdpa():
            assert other.scaled_dot_product_attention is F.scaled_dot_product_attention is not TORCH
            late = ModuleType("late")
            late.scaled_dot_product_attention = F.scaled_dot_product_attention
        assert other.scaled_dot_product_attention is TORCH
        late.scaled_dot_product_attention(*tensors(*[LARGE] * 3))
        assert serve_sdpa.report() == (0, {"outside of serve_sdpa": 1})

    def test_a_function_that_somebody_else_put_there_stays(self, monkeypatch):
        def theirs():
            pass

        with serve_sdpa():
            serving = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = theirs
        assert F.scaled_dot_product_attention is theirs
        F.scaled_dot_product_attention = TORCH
        assert serving is not TORCH

    def test_torchs_kernels_that_are_chosen_by_name_stay_chosen(self):
        with serve_sdpa(), sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(*tensors(*[LARGE] * 3))
        assert serve_sdpa.report() == (0, {"torch.nn.attention.sdpa_kernel chooses among torch's kernels": 1})

    def test_the_back_end_sdpa_stays_torchs(self):
        query, key, value = tensors(*[(2, 50, 4, 16)] * 3)
        with serve_sdpa(), fused_mha.backend("sdpa"):
            fused_mha.attention(query, key, value)
        assert serve_sdpa.report() == (0, {})

    def test_threads_count_every_call(self):
        def work():
            for _ in range(20):
                with serve_sdpa():
                    F.scaled_dot_product_attention(*tensors(*[LARGE] * 3))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert serve_sdpa.report() == (80, {})

    @pytest.mark.usefixtures("fresh_compiler")
    def test_a_compiled_function_follows_the_switch_without_a_graph_break(self):
        @torch.compile(fullgraph=True, backend="eager")
        def attend(query, key, value):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True).sum(-1)

        given = tensors(*[LARGE] * 3)
        expected = attend(*given)
        with torch.profiler.profile() as of_torch:
            attend(*given)
        with serve_sdpa():
            torch.testing.assert_close(attend(*given), expected)
            with torch.profiler.profile() as of_ours:
                attend(*given)
        with torch.profiler.profile() as of_torch_again:
            attend(*given)
        served = [
            any(event.name.startswith("fused_mha::attention") for event in profile.events())
            for profile in (of_torch, of_ours, of_torch_again)
        ]
        assert served == [False, True, False]

    @pytest.mark.usefixtures("fresh_compiler")
    def test_a_compiled_function_is_compiled_once_however_deep_the_contexts(self):
        counter = torch._dynamo.testing.CompileCounter()
        attend = torch.compile(Causal(), fullgraph=True, backend=counter)
        for depth in range(1, 4):
            with contextlib.ExitStack() as stack:
                for _ in range(depth):
                    stack.enter_context(serve_sdpa())
                attend(*tensors(*[LARGE] * 3))
        assert counter.frame_count == 1

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_export_script_and_fx_take_torchs_operator(self):
        given = tensors(*[LARGE] * 3)
        length = {2: torch.export.Dim("length", min=2, max=4096)}
        with serve_sdpa():
            exported = torch.export.export(Causal(), tuple(given), dynamic_shapes=[length] * 3)
            scripted, traced = torch.jit.script(Causal()), torch.fx.symbolic_trace(Causal())
        operators = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert operators == ["aten.scaled_dot_product_attention.default"]
        for model in (exported.module(), scripted, traced):
            torch.testing.assert_close(model(*given), TORCH(*given, is_causal=True))

    def test_what_overrides_the_function_still_does(self):
        class Override(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return function.__name__

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                return "mode" if function is TORCH else function(*args, **(kwargs or {}))

        query = torch.randn(LARGE).as_subclass(Override)
        with serve_sdpa():
            assert F.scaled_dot_product_attention(query, query, query) == "scaled_dot_product_attention"
            with Mode():
                assert F.scaled_dot_product_attention(*tensors(*[LARGE] * 3)) == "mode"

    @pytest.mark.parametrize("layout", ["heads first", "length first"])
    @pytest.mark.parametrize("flags", [{}, {"is_causal": True}, {"dropout_p": 0.1}], ids=str)
    def test_the_output_lies_in_memory_as_torchs(self, layout, flags):
        given = tensors(*[LARGE] * 3)
        if layout == "length first":
            given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
        output = fused_mha.scaled_dot_product_attention(*given, **flags)
        assert output.stride() == TORCH(*given, **flags).stride()

    def test_autocast_casts_a_mask_as_torch_does(self):
        given = tensors(*[LARGE] * 3)
        mask = torch.full((256, 256), torch.finfo(torch.float32).min)
        with torch.autocast("cpu", torch.bfloat16), fused_mha.backend("cpu"):
            ours = fused_mha.scaled_dot_product_attention(*given, mask)
            torch.testing.assert_close(ours, TORCH(*given, mask), atol=2e-2, rtol=2e-2)

    def test_an_expanded_mask_is_negated_once(self):
        inputs = sdpa.inputs_of(
            *tensors(*[LARGE] * 3), torch.ones(1, 1, 256, 256, dtype=torch.bool).expand(1, 4, 256, 256)
        )
        assert inputs.attn_mask.shape == (1, 1, 256, 256)

    def test_half_types_in_training_are_served_however_small(self):
        leaves = [x.requires_grad_() for x in tensors(*[q4] * 3, dtype=torch.bfloat16)]
        with serve_sdpa():
            F.scaled_dot_product_attention(*leaves)
            with torch.no_grad():
                F.scaled_dot_product_attention(*leaves)
        assert serve_sdpa.report() == (1, {"a call so small takes torch less time": 1})


@needs_library
@pytest.mark.parametrize("function", [fused_mha.scaled_dot_product_attention, TORCH], ids=["ours", "torch's"])
def test_explain_says_what_serves(function):
    query, key, value = tensors(*[LARGE] * 3)
    explanation = fused_mha.explain(function, query, key, value, is_causal=True)
    assert (explanation.chosen, explanation.reasons["cpu"]) == ("cpu", [])
    small = fused_mha.explain(function, *tensors(*[q4] * 3))
    assert (small.chosen, small.left["cpu"]) == ("sdpa", "a call so small takes torch less time")
    other = fused_mha.explain(function, query, key, value, is_causal=True, attn_mask=torch.zeros(256, 256))
    assert other.chosen == "sdpa"
    assert "attn_mask stands beside is_causal" in str(other)

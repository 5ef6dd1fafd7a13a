"""The choice of a back end: its order, the reasons against each, the override, and `explain`."""

import itertools
import threading

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fused_mha
from attention_oracle import BACKENDS, DEFAULTS, make_arguments, naive_attention, run_with_gradients, torch_attention
from fused_mha import MultiHeadAttention, dispatch, modes
from fused_mha.backends import capability, cpu, sdpa
from fused_mha.backends.capability import Capability, not_supported_reasons
from fused_mha.inputs import check_attention
from fused_mha.testing.tolerances import tolerance

REASONS_AGAINST_SDPA = {
    "it returns no attention weights (need_weights=True)": {"need_weights": True},
    "it returns no log-sum-exp (return_lse=True)": {"return_lse": True},
    "it has no fused dropout on the CPU (dropout_p=0.25)": {"dropout_p": 0.25},
    "an input is empty (query (0, 3, 4, 3), key (0, 4, 2, 3))": {"N": 0},
    "an input is empty (query (2, 0, 4, 3), key (2, 4, 2, 3))": {"L": 0},
    "an input is empty (query (2, 3, 4, 3), key (2, 0, 2, 3))": {"S": 0},
}
REASONS_AGAINST_CPU = {
    "it runs on cpu alone (query is on meta)": {"query": "meta", "key": "meta", "value": "meta"},
    "it knows no torch.float8_e5m2": {"attn_mask": torch.float8_e5m2},
    "it knows no torch.float8_e4m3fn and no torch.float8_e5m2": {
        "attn_mask": torch.float8_e5m2,
        "key_padding_mask": torch.float8_e4m3fn,
    },
}
MASKS = [
    {"mask_dtype": torch.bool},
    {"padding_dtype": torch.float32},
    {"window": (1, 1)},
    {"is_causal": True, "bias_kv": True},
    {"is_causal": True, "causal_alignment": "bottom_right"},
]
NOTE_OF_SDPA = "the masks of the call are merged into one additive tensor, (N|1, H|1, L|1, S)"
TRITON = "  triton: cannot: it runs on cuda alone (query is on cpu)\n"
NOTE_OF_REFERENCE = "the scores are built as an (N, H, L, S) tensor"


def checked(**arguments):
    return check_attention(**DEFAULTS | arguments)


def explain_attention(**arguments):
    return dispatch.explain_inputs(checked(**arguments))


def reasons_on_the_cpu(explanation):
    """Without those of `triton`, which are tested once."""
    reasons = dict(explanation.reasons)
    assert reasons.pop("triton")[0].startswith("it runs on cuda alone (query is on ")
    return reasons


def note_of_cpu():
    return f"instruction set {cpu.LIBRARY.isa}"


@pytest.fixture
def module():
    return fused_mha.MultiHeadAttention(16, 4, batch_first=True)


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def without_the_library(monkeypatch):
    """The back ends of an installation that found no C++ compiler."""
    missing = cpu.BACKEND._replace(capability=cpu.BACKEND.capability._replace(is_installed=False))
    monkeypatch.setattr(dispatch, "BACKENDS", (missing, *dispatch.BACKENDS[1:]))


@pytest.fixture
def served_by(monkeypatch):
    """The names of the back ends that have served, in order of the calls."""
    names = []

    def spy(candidate):
        def run(inputs):
            names.append(candidate.name)
            return candidate.run(inputs)

        return candidate._replace(run=run)

    monkeypatch.setattr(dispatch, "BACKENDS", tuple(spy(candidate) for candidate in dispatch.BACKENDS))
    return names


class TestOrder:
    def test_the_fused_core_comes_first_and_the_reference_last(self):
        assert [candidate.name for candidate in dispatch.BACKENDS] == ["cpu", "triton", "sdpa", "reference"]

    def call_in_four_ways(self, module, x):
        module(x, x, x, need_weights=False)
        module(x, x, x, need_weights=True)
        fused_mha.attention(**make_arguments())
        fused_mha.attention(**make_arguments(return_lse=True))

    def test_the_first_that_can_serve_does(self, module, x, served_by):
        self.call_in_four_ways(module, x)
        assert served_by == ["cpu"] * 4

    def test_without_the_library_the_others_serve(self, module, x, without_the_library, served_by):
        self.call_in_four_ways(module, x)
        assert served_by == ["sdpa", "reference", "sdpa", "reference"]

    def test_cpu_serves_what_sdpa_cannot(self):
        for arguments in REASONS_AGAINST_SDPA.values():
            explanation = explain_attention(**make_arguments(**arguments))
            assert (explanation.chosen, explanation.reasons["cpu"]) == ("cpu", [])

    def test_masks_go_to_cpu_with_no_note_of_memory(self):
        for masks in MASKS:
            explanation = explain_attention(**make_arguments(**masks))
            assert (explanation.chosen, explanation.notes) == ("cpu", [note_of_cpu()]), masks


class TestReasons:
    @pytest.mark.parametrize(("reason", "arguments"), REASONS_AGAINST_SDPA.items(), ids=REASONS_AGAINST_SDPA)
    def test_against_sdpa(self, reason, arguments, without_the_library):
        explanation = explain_attention(**make_arguments(**arguments))
        assert reasons_on_the_cpu(explanation) == {
            "cpu": ["it is not in this installation"],
            "sdpa": [reason],
            "reference": [],
        }
        assert explanation.chosen == "reference"

    @pytest.mark.parametrize(("reason", "changes"), REASONS_AGAINST_CPU.items(), ids=REASONS_AGAINST_CPU)
    def test_against_cpu(self, reason, changes):
        arguments = make_arguments(mask_dtype=torch.float32, padding_dtype=torch.float32)
        if "query" in changes:  # masks on another device are a reason against sdpa too
            arguments = {name: arguments[name] for name in changes}
        arguments |= {name: arguments[name].to(change) for name, change in changes.items()}
        explanation = explain_attention(**arguments)
        assert reasons_on_the_cpu(explanation) == {"cpu": [reason], "sdpa": [], "reference": []}
        assert explanation.chosen == "sdpa"

    def test_a_mask_that_cpu_does_not_know_is_served_by_the_next(self, served_by):
        arguments = make_arguments(mask_dtype=torch.float16, hidden=0.0)
        arguments["attn_mask"] = arguments["attn_mask"].to(torch.float8_e5m2)
        output = fused_mha.attention(**arguments).output
        same = arguments | {"attn_mask": arguments["attn_mask"].float()}
        torch.testing.assert_close(output, fused_mha.attention(**same).output)
        assert served_by == ["sdpa", "cpu"]

    def test_every_one_is_given_not_only_the_first(self):
        arguments = make_arguments(need_weights=True, return_lse=True, dropout_p=0.5, S=0)
        assert len(explain_attention(**arguments).reasons["sdpa"]) == 4
        arguments = make_arguments(mask_dtype=torch.float32)
        arguments = {name: x.to("meta", torch.float8_e5m2) for name, x in arguments.items()}
        assert explain_attention(**arguments).reasons["cpu"] == [
            "it runs on cpu alone (query is on meta)",
            "it knows no torch.float8_e5m2",
        ]

    def test_what_is_not_installed_is_the_only_one(self):
        arguments = make_arguments(need_weights=True, return_lse=True)
        missing = Capability(is_installed=False, weights=False, lse=False)
        assert not_supported_reasons(missing, checked(**arguments)) == ["it is not in this installation"]

    def test_rows_that_see_nothing_are_cleaned_where_a_device_does_not(self, monkeypatch):
        monkeypatch.setattr(sdpa, "_KNOW_EMPTY_ROWS", ())
        arguments = make_arguments(mask_dtype=torch.bool, H=2)
        arguments["attn_mask"][1] = True
        leaf = arguments["query"].requires_grad_()
        with fused_mha.backend("sdpa"):
            output = fused_mha.attention(**arguments).output
        assert not output[:, 1].any()
        with fused_mha.backend("reference"):
            torch.testing.assert_close(output, fused_mha.attention(**arguments).output)
        (grad,) = torch.autograd.grad(output.sum(), leaf)
        assert not grad[:, 1].any()
        assert grad.isfinite().all()

    def test_masks_of_half_types_on_another_device_than_the_cpu_are_one_against_sdpa(self):
        def reasons(dtype):
            given = make_arguments(mask_dtype=torch.bool, dtype=dtype).items()
            arguments = {name: x.to("meta") for name, x in given}
            return explain_attention(**arguments).chosen, not_supported_reasons(
                sdpa.BACKEND.capability, checked(**arguments)
            )

        reason = "its kernels for meta are not known to be right with a mask in torch.bfloat16"
        assert reasons(torch.bfloat16) == ("reference", [reason])
        assert reasons(torch.float32) == ("sdpa", [])

    def test_onnx_export_goes_to_operators_of_torch(self, monkeypatch, module, x, served_by):
        monkeypatch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
        assert torch.onnx.is_in_onnx_export()
        torch.export.export(module, (x, x, x), {"need_weights": False})  # what `torch.onnx.export` begins with
        torch.export.export(module, (x, x, x))
        assert served_by == ["sdpa", "reference"]
        monkeypatch.setattr(capability, "onnx_export_is_active", lambda: True)
        reason = "the model is exported to ONNX, which has no operator for it"
        reasons = reasons_on_the_cpu(fused_mha.explain(module, x, need_weights=False))
        assert reasons == {"cpu": [reason], "sdpa": [], "reference": []}

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
    @pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual level"])
    def test_transforms_go_to_the_reference(self, transform, module, x, served_by):
        def function(x):
            return module(x, x, x, need_weights=False)[0].sum()

        if transform == "vmap":
            torch.func.vmap(function)(x[None])
        elif transform == "grad":
            torch.func.grad(function)(x)
        elif transform == "jvp":
            torch.func.jvp(function, (x,), (x,))
        else:
            with torch.autograd.forward_ad.dual_level():
                function(x)
                reasons = reasons_on_the_cpu(fused_mha.explain(module, x, need_weights=False))
                reason = "a torch.func transform or forward-mode AD is active"
                assert reasons == {"cpu": [reason], "sdpa": [reason], "reference": []}
        assert served_by == ["reference"]

    def test_masks_on_sdpa_have_a_note_of_the_memory(self):
        with fused_mha.backend("sdpa"):
            for masks in MASKS:
                explanation = explain_attention(**make_arguments(**masks))
                assert (explanation.chosen, explanation.notes) == ("sdpa", [NOTE_OF_SDPA]), masks
            for plain in ({}, {"is_causal": True}, {"L": 4, "is_causal": True, "causal_alignment": "bottom_right"}):
                explanation = explain_attention(**make_arguments(**plain))
                assert (explanation.chosen, explanation.notes) == ("sdpa", []), plain


class TestOverride:
    @pytest.mark.parametrize("name", BACKENDS)
    def test_forces_one_back_end(self, name, module, x, served_by):
        with fused_mha.backend(name):
            module(x, x, x, need_weights=False)
            fused_mha.attention(**make_arguments())
        assert served_by == [name, name]

    def test_nests_and_ends_with_the_block(self, module, x, served_by):
        def call():
            module(x, x, x, need_weights=False)

        with fused_mha.backend("reference"):
            call()
            with fused_mha.backend("sdpa"):
                call()
            call()
        call()
        assert served_by == ["reference", "sdpa", "reference", "cpu"]

    def test_ends_with_an_exception(self, module, x, served_by):
        with pytest.raises(KeyError), fused_mha.backend("reference"):
            raise KeyError
        module(x, x, x, need_weights=False)
        assert served_by == ["cpu"]

    def test_is_of_the_thread_that_entered_it(self, module, x, served_by):
        with fused_mha.backend("reference"):
            thread = threading.Thread(target=lambda: module(x, x, x, need_weights=False))
            thread.start()
            thread.join()
            module(x, x, x, need_weights=False)
        assert served_by == ["cpu", "reference"]

    @pytest.mark.parametrize("name", ["flash", "", "Reference"])
    def test_unknown_name_is_an_error_that_lists_the_known_ones(self, name):
        with pytest.raises(
            ValueError, match=rf"^backend must be one of \['cpu', 'triton', 'sdpa', 'reference'\]; got '{name}'$"
        ):
            fused_mha.backend(name).__enter__()

    def test_unknown_name_leaves_the_override_as_it_was(self, module, x, served_by):
        with fused_mha.backend("reference"):
            with pytest.raises(ValueError, match="flash"):
                fused_mha.backend("flash").__enter__()
            module(x, x, x, need_weights=False)
        assert served_by == ["reference"]

    def test_choice_that_cannot_serve_is_never_replaced(self, module, x, served_by):
        text = (
            "no back end can serve this call.\n"
            "back end: none (by fused_mha.backend('sdpa'))\n"
            "  cpu: could serve\n"
            f"{TRITON}"
            "  sdpa: cannot: it returns no attention weights (need_weights=True)\n"
            "  reference: could serve"
        )
        with fused_mha.backend("sdpa"), pytest.raises(RuntimeError) as raised:
            module(x, x, x, need_weights=True)
        assert str(raised.value) == text
        assert served_by == []

    def test_choice_that_is_not_installed_is_never_replaced(self, module, x, without_the_library):
        text = r"by fused_mha.backend\('cpu'\)\)\n  cpu: cannot: it is not in this installation\n  triton: "
        with fused_mha.backend("cpu"), pytest.raises(RuntimeError, match=text):
            module(x, x, x, need_weights=False)

    def test_choice_that_cannot_serve_is_given_every_reason(self):
        arguments = make_arguments(need_weights=True, return_lse=True)
        with fused_mha.backend("sdpa"), pytest.raises(RuntimeError) as raised:
            fused_mha.attention(**arguments)
        assert "(need_weights=True); it returns no log-sum-exp (return_lse=True)\n" in str(raised.value)

    @pytest.mark.parametrize("first", BACKENDS)
    def test_takes_effect_under_torch_compile(self, first, module, x, served_by):
        compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], fullgraph=True, backend="eager")
        others = [name for name in BACKENDS if name != first]
        for name in (first, *others, first):
            with fused_mha.backend(name):
                served_by.clear()
                result = compiled(x)
                assert set(served_by) == {name}
                assert torch.equal(result, module(x, x, x, need_weights=False)[0])
        torch._dynamo.reset()


class TestAgreement:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(
        "arguments",
        [{}, {"is_causal": True}, {"mask_dtype": torch.float32, "padding_dtype": torch.bool}, {"bias_kv": True}],
        ids=["plain", "causal", "masks", "virtual key"],
    )
    def test_all_back_ends_agree_within_tolerance(self, dtype, arguments):
        arguments = make_arguments(L=9, S=17, D=8, dtype=dtype, **arguments)
        results = {}
        for name in BACKENDS:
            with fused_mha.backend(name):
                results[name] = run_with_gradients(fused_mha.attention, arguments)
        oracle = run_with_gradients(naive_attention, arguments, torch.float64)
        theirs = run_with_gradients(torch_attention, arguments)
        for name, exact in oracle.items():
            torch_error = (theirs[name].double() - exact).abs().max().item()
            bound = tolerance(dtype, torch_error, exact.abs().max().item(), terms=17)
            for one, other in itertools.combinations(BACKENDS, 2):
                difference = (results[one][name] - results[other][name]).abs().max().item()
                assert difference <= 2.0 * bound, (name, one, other)  # each may be one bound from the oracle


class TestExplain:
    def test_names_the_choice_and_the_reasons(self, module, x):
        reasons = {
            "cpu": [],
            "triton": ["it runs on cuda alone (query is on cpu)"],
            "sdpa": ["it returns no attention weights (need_weights=True)"],
            "reference": [],
        }
        explanation = fused_mha.explain(module, x)._replace(projections=None)
        assert explanation == fused_mha.Explanation("cpu", reasons, [note_of_cpu()], override=None)
        with fused_mha.backend("reference"):
            explanation = fused_mha.explain(module, x)._replace(projections=None)
        assert explanation == fused_mha.Explanation("reference", reasons, [NOTE_OF_REFERENCE], override="reference")

    def test_prints_choice_notes_and_reasons(self, module, x):
        assert str(fused_mha.explain(module, x)._replace(projections="by hand")) == (
            "back end: cpu (the first that can serve)\n"
            f"  note: {note_of_cpu()}\n"
            "  projections: by hand\n"
            f"{TRITON}"
            "  sdpa: cannot: it returns no attention weights (need_weights=True)\n"
            "  reference: could serve"
        )
        assert str(fused_mha.explain(module, x, need_weights=False)).endswith(
            "  sdpa: could serve\n  reference: could serve"
        )
        with fused_mha.backend("reference"):
            assert str(fused_mha.explain(module, x, need_weights=False)).startswith(
                f"back end: reference (by fused_mha.backend('reference'))\n  note: {NOTE_OF_REFERENCE}\n"
            )

    def test_prints_that_the_library_is_not_installed(self, module, x, without_the_library):
        projections = "  projections: by torch's linear, apart from the attention: the back end is not cpu\n"
        assert str(fused_mha.explain(module, x)) == (
            "back end: reference (the first that can serve)\n"
            f"  note: {NOTE_OF_REFERENCE}\n"
            f"{projections}"
            "  cpu: cannot: it is not in this installation\n"
            f"{TRITON}"
            "  sdpa: cannot: it returns no attention weights (need_weights=True)"
        )
        assert str(fused_mha.explain(module, x, need_weights=False)) == (
            "back end: sdpa (the first that can serve)\n"
            f"{projections}"
            "  cpu: cannot: it is not in this installation\n"
            f"{TRITON}"
            "  reference: could serve"
        )

    def test_says_none_where_the_override_cannot_serve(self, module, x):
        with fused_mha.backend("sdpa"):
            explanation = fused_mha.explain(module, x)
        assert (explanation.chosen, explanation.notes, explanation.override) == (None, [], "sdpa")
        assert str(explanation).startswith("back end: none (by fused_mha.backend('sdpa'))\n")

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("arguments", [{}, {"need_weights": False}, {"need_weights": False, "is_causal": True}])
    def test_names_the_back_end_that_then_serves(self, training, arguments, x, served_by):
        module = fused_mha.MultiHeadAttention(16, 4, dropout=0.5, batch_first=True).train(training)
        chosen = fused_mha.explain(module, x, x, x, **arguments).chosen
        assert served_by == []  # it computes no attention
        module(x, x, x, **arguments)
        assert served_by == [chosen]

    def test_takes_keys_values_and_forward_arguments(self, module, x):
        keys = torch.randn(2, 0, 16)
        explanation = fused_mha.explain(module, x, keys, keys, need_weights=False)
        assert explanation.reasons["sdpa"] == ["an input is empty (query (2, 5, 4, 4), key (2, 0, 4, 4))"]
        assert fused_mha.explain(module, x, keys, need_weights=False) == explanation

    def test_draws_no_random_numbers(self, x):
        module = fused_mha.MultiHeadAttention(16, 4, dropout=0.5, batch_first=True)
        state = torch.get_rng_state()
        fused_mha.explain(module, x)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
    def test_explains_a_nested_tensor_as_the_module_serves_it(self, module, x):
        nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
        module.eval()
        with torch.no_grad():
            module(nested, nested, nested, need_weights=False)
            assert fused_mha.explain(module, nested, need_weights=False).chosen == "cpu"

    def test_refuses_wrong_input_as_the_module_does(self, module, x):
        with pytest.raises(AssertionError, match="embed_dim = 16"):
            fused_mha.explain(module, x[..., :8])

    @pytest.mark.parametrize("other", [nn.MultiheadAttention(16, 4), nn.Linear(16, 16), None], ids=type)
    def test_takes_our_module_alone(self, other, x):
        name = type(other).__name__
        with pytest.raises(TypeError, match=f"^module must be a fused_mha.MultiHeadAttention; got {name}$"):
            fused_mha.explain(other, x)


def test_without_torchs_private_names_the_reference_serves(monkeypatch):
    monkeypatch.setattr(modes, "_functorch_is_active", lambda: True)  # what stands in for a name that is gone
    module, x = MultiHeadAttention(8, 2), torch.randn(3, 2, 8)
    assert fused_mha.explain(module, x, need_weights=False).chosen == "reference"


def test_explain_names_an_argument_that_forward_does_not_have():
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        fused_mha.explain(MultiHeadAttention(8, 2), torch.randn(3, 2, 8), masks=None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_causal_mask_beside_is_causal_is_not_merged(dtype):
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    if dtype != torch.bool:
        mask = torch.zeros(4, 4).masked_fill(mask, -torch.inf)
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    with fused_mha.backend("sdpa"):
        assert fused_mha.explain(module, x, **arguments).notes == []
        assert torch.equal(module(x, x, x, **arguments)[0], module(x, x, x, is_causal=True, need_weights=False)[0])
        mask[3, 0] = True if dtype == torch.bool else -2.0  # says more than causality
        assert fused_mha.explain(module, x, **arguments).notes == [NOTE_OF_SDPA]
        output, _ = module(x, x, x, **arguments)
    with fused_mha.backend("reference"):
        expected, _ = module(x, x, x, **arguments)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_make_fx_records_the_mask_although_it_is_causal_at_the_trace(backend):
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    causal = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)

    def call(x, mask):
        return module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    with torch.no_grad(), fused_mha.backend(backend):
        graph = make_fx(call)(x, causal)
        mask = causal.clone()
        mask[3, 0] = -2.0
        torch.testing.assert_close(graph(x, mask), call(x, mask))


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_a_mask_row_that_broadcasts_over_queries_is_not_taken_for_a_causal_one(backend):
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    mask = torch.tensor([False, True, False, False]).view(1, 1, 1, 4)  # hides key 1 from every query
    arguments = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    with fused_mha.backend("reference"):
        expected, _ = module(x, x, x, **arguments)
    with fused_mha.backend(backend):
        torch.testing.assert_close(module(x, x, x, **arguments)[0], expected)

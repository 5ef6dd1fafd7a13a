"""The choice of a back end: its order and the override; and that all agree."""

import itertools
import threading

import pytest
import torch

import fused_mha
from attention_oracle import BACKENDS, make_arguments, naive_attention, run_with_gradients, torch_attention
from fused_mha import MultiHeadAttention
from fused_mha.core import dispatch, modes
from fused_mha.testing.tolerances import tolerance


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
            "  triton: cannot: it runs on cuda alone (query is on cpu)\n"
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

    @pytest.mark.usefixtures("fresh_compiler")
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


def test_without_torchs_private_names_the_reference_serves(monkeypatch):
    monkeypatch.setattr(modes, "_functorch_is_active", lambda: True)  # what stands in for a name that is gone
    module, x = MultiHeadAttention(8, 2), torch.randn(3, 2, 8)
    assert fused_mha.explain(module, x, need_weights=False).chosen == "reference"

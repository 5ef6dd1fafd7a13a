"""The one rule of tolerances: it stands without torch's error, which is luck, and fails one part in a thousand."""

import pytest
import torch

import attention_oracle
import closeness
import fused_mha
from attention_oracle import BACKENDS, SERVE_EVERYTHING, assert_matches_oracle, can_serve, make_arguments
from fused_mha import MultiHeadAttention
from fused_mha.testing import compare, grid, parity, tolerances
from fused_mha.testing.tolerances import FLOOR, rounding_errors, tolerance

PRECISE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOOR, ids=str)
CALLS = {
    "everything": {"need_weights": True, "return_lse": True, "mask_dtype": torch.float32, "bias_kv": True},
    "output": {"padding_dtype": torch.bool, "is_causal": True},
    "large scores": {"scale": 30.0, "need_weights": True, "average_attn_weights": False},
    "one key": {"S": 1, "return_lse": True},
}


class TestRule:
    @pytest.mark.parametrize(
        ("dtype", "floor"),
        [(torch.float64, 2.0**-50), (torch.float32, 2.0**-21), (torch.bfloat16, 2.0**-5), (torch.float16, 2.0**-8)],
        ids=str,
    )
    def test_floor_is_four_units_in_the_last_place(self, dtype, floor):
        assert FLOOR[dtype] == floor
        assert tolerance(dtype, 0.0, 1.0) == floor

    def test_by_hand(self):
        # 2 * torch's error + max(4 eps * magnitude, what rounding moves)
        assert tolerance(torch.bfloat16, 0.25, 8.0) == 0.5 + 8.0 / 32.0
        assert tolerance(torch.bfloat16, 0.25, 8.0, rounding_error=1.0) == 0.5 + 1.0
        assert tolerance(torch.float16, 0.0, 0.0, terms=100) == 0.0

    def test_sums_grow_by_the_root_of_their_terms_but_for_half_types(self):
        assert tolerance(torch.float32, 0.0, 8.0, terms=9) == 3.0 * 2.0**-18
        assert tolerance(torch.float32, 0.0, 8.0, terms=9, rounding_error=1.0) == 3.0
        assert tolerance(torch.bfloat16, 0.0, 8.0, terms=9, rounding_error=1.0) == 1.0


class TestRoundingErrors:
    def errors(self, function, *numbers, dtype=torch.float32):
        x = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)

        def run():
            y = function(x)
            return {"y": y, "grad": torch.autograd.grad(y.sum(), x)[0]}

        return rounding_errors(run, run(), dtype)

    def test_what_cancels_moves_by_the_size_of_its_terms(self):
        eps = torch.finfo(torch.float32).eps
        error = self.errors(lambda x: x[0] - x[1], 1000.0, 999.0)["y"]
        assert 100.0 * eps < error <= 2000.0 * eps

    def test_the_size_of_the_logits_weighs(self):
        small, large = (self.errors(lambda x, s=s: torch.softmax(x * s, 0), 1.0, 0.99, 0.98)["y"] for s in (1.0, 100.0))
        assert large > 10.0 * small

    def test_a_gradient_that_is_zero_moves_by_what_cancels_in_it(self):
        assert self.errors(lambda x: torch.softmax(x, 0) * 3.0, 5.0)["grad"] > 1e-8

    def test_the_precision_is_the_dtypes(self):
        error = {dtype: self.errors(torch.exp, 1.0, 2.0, dtype=dtype)["y"] for dtype in FLOOR}
        assert error[torch.bfloat16] == pytest.approx(error[torch.float32] * 2.0**16, rel=0.05)
        assert 0.0 < error[torch.float64] < 1e-14

    def test_nothing_moves_where_no_operation_rounds(self):
        assert self.errors(lambda x: x.view(2, 1)[:1], 1.0, 2.0)["y"] == 0.0

    def test_infinities_and_results_that_are_missing_have_none(self):
        infinite = {"x": torch.tensor([float("inf"), 1.0], dtype=torch.float64) * 2.0, "none": None}
        assert rounding_errors(lambda: infinite, infinite, torch.float32) == {"x": 0.0, "none": 0.0}
        nan = torch.tensor([-float("inf"), 1.0], dtype=torch.float64)
        assert 0.0 < rounding_errors(lambda: {"x": nan * 2.0}, {"x": nan * 2.0}, torch.float32)["x"] < 1e-6

    def test_the_draws_are_the_same_each_time_and_leave_torchs_generator_alone(self):
        state = torch.get_rng_state()
        first, second = (self.errors(torch.exp, 1.0, 2.0) for _ in range(2))
        assert first == second
        assert torch.equal(torch.get_rng_state(), state)

    def test_large_operands_have_noise_everywhere(self):
        x = torch.ones(2**19, dtype=torch.float64)
        with tolerances._Rounded(torch.float32, 0):
            changed = x * 1.0 != 1.0
        assert changed.all()

    def test_a_view_or_a_change_in_place_is_left_alone(self):
        x = torch.ones(3, dtype=torch.float64)
        with tolerances._Rounded(torch.float32, 0):
            assert x.view(3, 1)._base is x
            x.add_(1.0)
        assert torch.equal(x, torch.full_like(x, 2.0))


@pytest.fixture
def no_luck(monkeypatch):
    """torch's error taken as zero."""
    monkeypatch.setattr(tolerances, "FACTOR", 0.0)


@pytest.mark.usefixtures("no_luck")
class TestRightResultsPassWithoutTorchsError:
    @EVERY_DTYPE
    def test_modules(self, dtype):
        for seed, case in enumerate([*grid()][::2]):
            ours, theirs, inputs, arguments = case._replace(dtype=dtype).build(seed=seed)
            assert [c for c in compare(ours, theirs, *inputs, seed=seed, **arguments) if not c.agrees] == []

    @EVERY_DTYPE
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    @pytest.mark.parametrize("back_end", BACKENDS)
    def test_cores(self, back_end, call, dtype):
        for seed in range(3):
            arguments = make_arguments(**{"D": 8, "dtype": dtype, "seed": seed} | call)
            if can_serve(back_end, arguments):
                assert_matches_oracle(arguments, back_end)
            else:
                assert back_end not in SERVE_EVERYTHING


class TestOnePartInAThousandFails:
    """Whatever torch's error is: twice of it is allowed in addition."""

    @PRECISE
    def test_in_every_quantity_of_every_module(self, dtype, monkeypatch):
        run = parity._run

        def wrong(module, *arguments):
            found = run(module, *arguments)
            if type(module) is not MultiHeadAttention:
                return found
            return type(found)(*({k: x if x is None else x * 1.001 for k, x in part.items()} for part in found))

        monkeypatch.setattr(parity, "_run", wrong)
        for seed, case in enumerate(case for case in grid() if case.group != "empty"):
            ours, theirs, inputs, arguments = case._replace(dtype=dtype).build(seed=seed)
            passed = [c.quantity for c in compare(ours, theirs, *inputs, **arguments) if c.agrees]
            assert passed in (["state_dict"], ["state_dict", "weights"]), case

    @PRECISE
    @pytest.mark.parametrize("call", [CALLS["everything"], CALLS["large scores"]], ids=["everything", "large scores"])
    def test_in_every_result_of_a_core(self, call, dtype, monkeypatch):
        run = attention_oracle.run_with_gradients
        wrong = ""

        def with_one_wrong(function, arguments, dtype=None):
            found = run(function, arguments, dtype)
            return found | {wrong: found[wrong] * 1.001} if function is fused_mha.attention else found

        monkeypatch.setattr(attention_oracle, "run_with_gradients", with_one_wrong)
        for seed in range(3):
            moved = {}  # what rounding moves in the oracle, whichever result is wrong

            def errors(oracle, exact, dtype, moved=moved):
                if dtype not in moved:
                    moved[dtype] = rounding_errors(oracle, exact, dtype)
                return moved[dtype]

            monkeypatch.setattr(closeness, "rounding_errors", errors)
            arguments = make_arguments(**{"D": 8, "dtype": dtype, "seed": seed} | call)
            for wrong in run(fused_mha.attention, arguments):
                with pytest.raises(AssertionError, match=wrong):
                    assert_matches_oracle(arguments, "reference")

"""`fused_mha.attention` under differentiation of every kind, merged by blocks, and with dropout."""

import pytest
import torch
import torch.nn.functional as F

import fused_mha
from attention_oracle import (
    BACKENDS,
    SERVE_EVERYTHING,
    assert_matches_oracle,
    checked,
    make_arguments,
    naive_attention,
    run_with_gradients,
)
from differentiation import CASES, as_function, finite
from fused_mha.core import reference
from fused_mha.testing.tolerances import tolerance

# torch scripts its forward-mode decompositions on first use
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")

EVERYTHING = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
OF_A_HEAD = {"weights_of_heads": (1,), "return_lse": True}
each_that_serves_everything = pytest.mark.parametrize("backend", SERVE_EVERYTHING)


@pytest.mark.parametrize(
    "wanted",
    [{}, {"need_weights": True}, EVERYTHING, OF_A_HEAD],
    ids=["output", "averaged", "everything", "weights of a head"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_numeric_ones(backend, case, wanted):
    shape = {"N": 2, "L": 3, "S": 4, "H": 2, "H_kv": 2, "D": 2, "D_v": 3, "dtype": torch.float64} | case
    function, values = as_function(fused_mha.attention, make_arguments(**shape, **wanted))
    with fused_mha.backend("reference" if wanted and backend == "sdpa" else backend):
        assert torch.autograd.gradcheck(function, values)


@each_that_serves_everything
@pytest.mark.parametrize("wanted", [EVERYTHING, OF_A_HEAD], ids=["everything", "weights of a head"])
@pytest.mark.parametrize("case", ["plain", "float mask", "virtual keys"])
def test_second_derivatives_are_the_numeric_ones(backend, case, wanted):
    shape = {"N": 1, "L": 2, "S": 3, "H": 2, "H_kv": 1, "D": 2, "D_v": 2, "dtype": torch.float64}
    function, values = as_function(fused_mha.attention, make_arguments(**shape | CASES[case] | wanted))
    with fused_mha.backend(backend):
        assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("wanted", [{}, EVERYTHING, OF_A_HEAD], ids=["output", "everything", "weights of a head"])
@pytest.mark.parametrize("case", ["plain", "float mask", "virtual keys"])
def test_jvp_is_the_numeric_derivative(case, wanted):
    function, values = as_function(fused_mha.attention, make_arguments(dtype=torch.float64, **CASES[case], **wanted))
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in values)
    _, derivatives = torch.func.jvp(function, values, tangents)
    # <cotangent, J tangent> = <J^T cotangent, tangent>
    leaves = [x.detach().clone().requires_grad_() for x in values]
    outputs = function(*leaves)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    forward = sum((c * d).sum() for c, d in zip(cotangents, derivatives, strict=True))
    products = torch.cat([(g * t).flatten() for g, t in zip(gradients, tangents, strict=True)])
    bound = tolerance(torch.float64, 0.0, products.abs().max().item(), products.numel())
    assert abs(forward - products.sum()).item() <= bound
    assert forward.abs() > 1e-3


def test_forward_mode_ad_gives_no_silent_zeros():
    arguments = make_arguments(dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments["value"], torch.ones_like(arguments["value"]))
        output = fused_mha.attention(**arguments | {"value": dual}).output
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
    assert (tangent - 1.0).abs().max().item() <= tolerance(torch.float64, 0.0, 1.0)  # the weights of a row sum to 1


def test_vmap_gives_what_a_loop_gives():
    blocks = [make_arguments(dtype=torch.float64, padding_dtype=torch.bool, seed=seed) for seed in range(3)]
    stacked = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}

    def function(arguments):
        return tuple(fused_mha.attention(**arguments, **EVERYTHING))

    mapped = torch.func.vmap(function)(stacked)
    for i, block in enumerate(blocks):
        for ours, alone in zip(mapped, function(block), strict=True):
            is_finite = alone.isfinite()
            assert torch.equal(ours[i].isfinite(), is_finite)
            difference = (ours[i] - alone)[is_finite].abs().max().item()
            assert difference <= tolerance(torch.float64, 0.0, alone[is_finite].abs().max().item())


def test_per_sample_gradients_by_vmap_of_grad():
    arguments = make_arguments(dtype=torch.float64)

    def loss(query, key, value):
        return fused_mha.attention(query[None], key[None], value[None]).output.pow(2).sum()

    values = [arguments[name] for name in ("query", "key", "value")]
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*values)
    leaves = [x.clone().requires_grad_() for x in values]
    fused_mha.attention(*leaves).output.pow(2).sum().backward()
    for ours, leaf in zip(per_sample, leaves, strict=True):
        bound = tolerance(torch.float64, 0.0, leaf.grad.abs().max().item(), leaf.shape[1])
        assert (ours - leaf.grad).abs().max().item() <= bound


@each_that_serves_everything
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_sum_exp_is_differentiable_in_fp32_or_fp64(backend, dtype):
    arguments = make_arguments(dtype=dtype, mask_dtype=torch.float32, return_lse=True)
    assert_matches_oracle(arguments, backend)
    arguments["query"].requires_grad_()
    with fused_mha.backend(backend):
        lse = fused_mha.attention(**arguments).lse
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(lse.sum(), arguments["query"])
    assert gradient.dtype == dtype
    assert gradient.abs().max() > 1e-2


@each_that_serves_everything
def test_log_sum_exp_is_taken_before_dropout(backend):
    arguments = make_arguments(return_lse=True)
    with fused_mha.backend(backend):
        with_dropout = fused_mha.attention(**arguments, dropout_p=0.9).lse
        assert torch.equal(with_dropout, fused_mha.attention(**arguments).lse)


def merge(first, second):
    """Attention to two blocks of keys, from their outputs and log-sum-exps."""
    lse = torch.logaddexp(first.lse, second.lse)
    shares = [torch.exp(x.lse - lse).transpose(1, 2).unsqueeze(-1) for x in (first, second)]
    return shares[0] * first.output + shares[1] * second.output, lse


@each_that_serves_everything
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("masks", [{}, {"padding_dtype": torch.float64, "mask_dtype": torch.float64}], ids=str)
def test_two_blocks_merge_to_the_whole_with_equal_gradients(backend, split, masks):
    arguments = finite(make_arguments(S=5, dtype=torch.float64, return_lse=True, **masks))

    def by_blocks(**a):
        blocks = []
        for part in (slice(0, split), slice(split, None)):
            keys = {"key": a["key"][:, part], "value": a["value"][:, part]}
            masks = {name: a[name][:, part] for name in ("attn_mask", "key_padding_mask") if name in a}
            blocks.append(fused_mha.attention(a["query"], **keys, **masks, return_lse=True))
        output, lse = merge(*blocks)
        return fused_mha.AttentionResult(output, None, lse)

    with fused_mha.backend(backend):
        merged = run_with_gradients(by_blocks, arguments)
        whole = run_with_gradients(fused_mha.attention, arguments)
    oracle = run_with_gradients(naive_attention, arguments)
    assert set(merged) == set(whole) == set(oracle)
    for name, exact in oracle.items():
        error, own_error = ((x[name] - exact).abs().max().item() for x in (merged, whole))
        assert error <= tolerance(torch.float64, own_error, exact.abs().max().item(), terms=2 * exact.shape[-1]), name


class TestDropout:
    P = 0.4

    def arguments(self, **others):
        return make_arguments(N=2, L=3, S=4, H=4, H_kv=2, dtype=torch.float64, **others)

    def keep(self, seed, shape):
        """What `F.dropout` keeps of an (N * H, L, S') tensor under this seed."""
        torch.manual_seed(seed)
        N, H, L, S = shape
        return F.dropout(torch.ones(N * H, L, S, dtype=torch.float64), self.P).ne(0).unflatten(0, (N, H))

    @pytest.mark.parametrize("bias_kv", [False, True], ids=["", "virtual key"])
    def test_draws_of_the_reference_are_those_of_torch_on_one_row_of_heads(self, bias_kv):
        arguments = self.arguments(dropout_p=self.P, bias_kv=bias_kv, need_weights=True, average_attn_weights=False)
        keep = self.keep(5, (2, 4, 3, 5 if bias_kv else 4))
        assert 0 < keep.sum() < keep.numel()
        torch.manual_seed(5)
        with fused_mha.backend("reference"):
            ours = run_with_gradients(fused_mha.attention, arguments)
        oracle = run_with_gradients(lambda **a: naive_attention(keep, **a), arguments)
        assert torch.equal(ours["weights"] != 0, keep)
        for name, exact in oracle.items():
            bound = tolerance(torch.float64, 0.0, exact.abs().max().item(), terms=keep.numel() // exact[..., 0].numel())
            assert (ours[name] - exact).abs().max().item() <= bound, name

    def test_a_given_mask_replays_a_draw_bit_by_bit(self):
        arguments = self.arguments(dropout_p=self.P, need_weights=True, average_attn_weights=False)
        torch.manual_seed(5)
        with fused_mha.backend("reference"):
            drawn = fused_mha.attention(**arguments)
        state = torch.get_rng_state()
        inputs = checked(**arguments)
        output, weights, _ = reference.attention(*inputs, dropout_mask=self.keep(5, (2, 4, 3, 4)))
        assert torch.equal(output, drawn.output)
        assert torch.equal(weights, drawn.weights)
        torch.manual_seed(5)
        reference.attention(*inputs, dropout_mask=torch.ones(2, 4, 3, 4, dtype=torch.bool))
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())
        assert not torch.equal(torch.get_rng_state(), state)

    @each_that_serves_everything
    def test_everything_dropped_gives_zeros_and_finite_gradients(self, backend):
        arguments = self.arguments(dropout_p=1.0, need_weights=True)
        with fused_mha.backend(backend):
            results = run_with_gradients(fused_mha.attention, arguments)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in results.values())

    def test_a_given_mask_that_keeps_nothing_gives_zeros(self):
        arguments = self.arguments(dropout_p=1.0, need_weights=True)
        inputs = checked(**arguments)
        nothing = torch.zeros(2, 4, 3, 4, dtype=torch.bool)
        output, weights, _ = reference.attention(*inputs, dropout_mask=nothing)
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(weights, torch.zeros_like(weights))

    @each_that_serves_everything
    def test_the_mean_over_draws_is_the_result_without_dropout(self, backend):
        draws = 4000
        # each draw is one element of the batch
        one = make_arguments(N=1, L=1, S=3, H=1, H_kv=1, dtype=torch.float64, need_weights=True)
        many = {name: x.expand(draws, -1, -1, -1) if isinstance(x, torch.Tensor) else x for name, x in one.items()}
        torch.manual_seed(0)
        with fused_mha.backend(backend):
            weights = fused_mha.attention(**many, dropout_p=self.P).weights
            expected = fused_mha.attention(**one).weights[0]
        deviation = expected * (self.P / (1.0 - self.P)) ** 0.5 / draws**0.5  # of the mean of scaled Bernoulli draws
        assert bool(((weights.mean(0) - expected).abs() <= 5.0 * deviation).all())

    @each_that_serves_everything
    def test_is_applied_whatever_the_grad_mode(self, backend):
        with torch.no_grad(), fused_mha.backend(backend):
            weights = fused_mha.attention(**self.arguments(dropout_p=self.P, need_weights=True)).weights
            plain = fused_mha.attention(**self.arguments(need_weights=True)).weights
        assert not torch.allclose(weights, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantity", ["output", "gradient"])
def test_the_comparison_with_the_oracle_catches_one_part_in_a_thousand(backend, quantity, monkeypatch):
    arguments = make_arguments()
    right = fused_mha.attention

    def wrong(**a):
        if quantity == "output":
            return right(**a)._replace(output=right(**a).output * 1.001)
        key = a["key"] * 1.001 - a["key"].detach() * 0.001  # the value of key, 1.001 times its gradient
        return right(**a | {"key": key})

    assert_matches_oracle(arguments, backend)
    monkeypatch.setattr(fused_mha, "attention", wrong)
    with pytest.raises(AssertionError, match="output: " if quantity == "output" else "grad of key: "):
        assert_matches_oracle(arguments, backend)

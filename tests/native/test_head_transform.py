"""The operator `transform_heads`: Q/K norm and rotation on every instruction set, against `core.heads` in fp64."""

import pytest
import torch
from torch import nn

import fused_mha
from closeness import assert_close_to_oracle
from fused_mha import RotaryEmbedding
from fused_mha.core import heads as by_torch
from fused_mha.core.heads import QK_NORMS, HeadNorm
from fused_mha.module import heads as by_operator
from fused_mha.ops import heads as operator
from native.call_space import DTYPES, LAYOUTS, lay_out

CASES = {
    f"{kind or 'no norm'}, {layout or 'no rotation'}, {D}": (kind, layout, D, R)
    for kind in (None, *QK_NORMS)
    for layout in (None, "half", "interleaved")
    for D, R in ((1, 0), (4, 4), (7, 6), (33, 16), (64, 64), (80, 40), (1024, 1024))
    if (kind or layout) and (R or not layout)
}


def operands(case, dtype, N=2, L=37, H=3, of_batch=False):
    kind, layout, D, R = case
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(N, L, H, D, generator=generator).to(dtype) for _ in range(2))
    norm = rotation = None
    if kind is not None:
        weight, bias = (torch.randn(D, generator=generator).to(dtype) for _ in range(2))
        norm = HeadNorm(kind, weight, bias if kind == "layer" else None)
    if layout is not None:
        positions = torch.randint(0, 5000, (N, L) if of_batch else (L,), generator=generator)
        rotation = RotaryEmbedding(R, layout=layout).at(positions, x)
    return x, grad, norm, rotation


def results(transform, dtype, x, grad, norm, rotation):
    """The result and the gradients, computed in a dtype."""
    leaves = {"x": x, **({} if norm is None else {"weight": norm.weight, "bias": norm.bias})}
    leaves = {name: t.to(dtype).detach().requires_grad_() for name, t in leaves.items() if t is not None}
    if norm is not None:
        norm = norm._replace(weight=leaves["weight"], bias=leaves.get("bias"))
    if rotation is not None and dtype == torch.float64:
        rotation = rotation._replace(cos=rotation.cos.double(), sin=rotation.sin.double())
    output = transform(leaves["x"], norm, rotation)
    found = torch.autograd.grad(output, list(leaves.values()), grad.to(dtype))
    return {"output": output.detach(), **{f"grad of {name}": g for name, g in zip(leaves, found, strict=True)}}


def assert_matches(given, dtype):
    ours = results(by_operator.transform_heads, dtype, *given)
    theirs = results(by_torch.transform_heads, dtype, *given)
    rows = given[0].numel() // given[0].shape[3]
    longest = {name: rows if name in ("grad of weight", "grad of bias") else given[0].shape[3] for name in ours}
    exact = lambda: results(by_torch.transform_heads, torch.float64, *given)  # noqa: E731
    assert_close_to_oracle(ours, theirs, exact, longest, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_match_the_oracle(base_isa, case, dtype):
    assert_matches(operands(case, dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_batch", [True, False])
def test_any_memory_and_positions_of_each_element(base_isa, layout, of_batch):
    x, grad, norm, rotation = operands(("rms", "half", 48, 32), torch.float32, of_batch=of_batch)
    assert_matches((lay_out(x, layout), lay_out(grad, layout), norm, rotation), torch.float32)


@pytest.mark.parametrize("kind", QK_NORMS)
def test_one_position_and_many_tasks(base_isa, kind):
    for N, L in ((1, 1), (1, 32), (1, 33), (5, 70)):
        assert_matches(operands((kind, "half", 16, 16), torch.float32, N=N, L=L), torch.float32)


def test_threads_change_no_bit(base_isa, set_num_threads):
    given = operands(("layer", "interleaved", 24, 16), torch.float32, N=3, L=90)
    found = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        found.append(results(by_operator.transform_heads, torch.float32, *given))
    for name, x in found[0].items():
        assert all(torch.equal(other[name], x) for other in found[1:]), name


@pytest.mark.parametrize("kind", QK_NORMS)
def test_second_derivatives(kind):
    x, _, norm, rotation = operands((kind, "half", 5, 4), torch.float64, L=2, H=1)
    inputs = [t.requires_grad_() for t in (x, norm.weight, norm.bias) if t is not None]

    def call(x, weight, bias=None):
        return by_operator.transform_heads(x, HeadNorm(kind, weight, bias), rotation)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("case", [("layer", "half", 6, 4), ("rms", None, 5, 0), (None, "interleaved", 6, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, dtype):
    x, grad, norm, rotation = operands(case, dtype)
    weight, bias = (None, None) if norm is None else norm[1:]
    cos, sin, layout = rotation or (None, None, "half")
    kind = 0 if norm is None else by_operator.NORMS[norm.kind]
    numbers = (kind, layout == "interleaved", by_torch.EPS.get(case[0], 0.0))
    learned = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fused_mha.transform_heads.default, (*learned, cos, sin, *numbers))
    torch.library.opcheck(
        torch.ops.fused_mha.transform_heads_backward.default, (grad, x, weight, bias, cos, sin, *numbers)
    )


class Layer(nn.Module):
    """What `torch.export` takes."""

    def forward(self, x):
        return RotaryEmbedding(4)(x)


def test_compiled_and_exported_programs_hold_the_operator():
    x = torch.randn(2, 5, 3, 8)
    program = torch.export.export(Layer(), (x,), strict=True)
    assert "fused_mha.transform_heads" in str(program.graph)
    torch.testing.assert_close(program.module()(x), Layer()(x))
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), Layer()(x))


def test_a_forced_back_end_and_transforms_take_torchs_operators():
    x = torch.randn(2, 5, 3, 8)
    with fused_mha.backend("reference"):
        torch.testing.assert_close(Layer()(x), by_torch.transform_heads(x, None, RotaryEmbedding(4).counted(0, x)))
    torch.testing.assert_close(torch.func.vmap(Layer())(x[None])[0], Layer()(x))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({0: torch.randn(2, 3, 4)}, "x must be 4-D"),
        ({0: torch.randn(1, 2, 3, 1025)}, "x must have a head size from 1 to 1024"),
        ({1: torch.randn(7)}, "weight must have size 8"),
        ({1: None}, "weight must have size 8"),
        ({1: torch.ones(8, dtype=torch.float64)}, "weight must be float64 where x is"),
        ({2: torch.ones(9)}, "bias must have size 8"),
        ({3: torch.randn(5, 5), 4: torch.randn(5, 5)}, "cos must be"),
        ({3: torch.randn(3, 5, 2), 4: torch.randn(3, 5, 2)}, "cos must be"),
        ({4: torch.randn(5, 3)}, "sin must have size 2"),
        ({4: None}, "sin must have size"),
        ({3: torch.randn(4, 2)}, "cos must have size 5"),
        ({5: 4}, "norm must be from 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(changed, text):
    x = torch.randn(2, 5, 3, 8)
    given = [x, torch.ones(8), None, torch.randn(5, 2), torch.randn(5, 2), 1, False, 1e-6]
    for i, value in changed.items():
        given[i] = value
    with pytest.raises(RuntimeError, match=text):
        torch.ops.fused_mha.transform_heads(*given)


@pytest.mark.parametrize("kind", QK_NORMS)
@pytest.mark.parametrize("L", [0, 40])
def test_the_operators_in_pytorch_sum_up_to_the_same(kind, L):
    x, grad, norm, rotation = operands((kind, "half", 8, 6), torch.float64, L=L)
    inputs = (x, *norm[1:], *rotation[:2], by_operator.NORMS[kind], False, by_torch.EPS[kind])
    torch.testing.assert_close(operator._fallback(*inputs), torch.ops.fused_mha.transform_heads(*inputs))
    found, expected = operator._fallback_backward(grad, *inputs), operator.transform_heads_backward(grad, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.sum(0), theirs.sum(0))

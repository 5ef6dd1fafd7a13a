"""Compiled and exported models on the CPU library: one graph for every size, and the numbers of eager mode."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fused_mha
from attention_oracle import make_arguments, run_with_gradients
from fused_mha import MultiHeadAttention
from fused_mha.testing.tolerances import tolerance
from native.dense_oracle import native_attention

# torch's compilers script some of their own code
pytestmark = [pytest.mark.usefixtures("fresh_compiler"), pytest.mark.filterwarnings("ignore:.torch.jit.script")]

SIZES = [(2, 5), (3, 9), (7, 33)]
CALLS = {
    "plain": {"need_weights": False},
    "averaged weights and padding": {"padding": True},
    "weights per head": {"average_attn_weights": False},
    "causal": {"need_weights": False, "is_causal": True},
}


class Block(torch.nn.Module):
    """A model that holds the module and adds up what it gives."""

    def __init__(self, **arguments):
        super().__init__()
        self.attention = MultiHeadAttention(16, 4, batch_first=True)
        self.arguments = arguments

    def forward(self, x, padding):
        output, weights = self.attention(x, x, x, key_padding_mask=padding, **self.arguments)
        return output if weights is None else torch.cat([output, weights], dim=-1)


def call_of(module, arguments):
    arguments = dict(arguments)
    has_padding = arguments.pop("padding", False)

    def call(x, padding):
        return module(x, x, x, key_padding_mask=padding if has_padding else None, **arguments)

    return call


def results_and_gradients(call, module, N, L):
    generator = torch.Generator().manual_seed(N * 100 + L)
    x = torch.randn(N, L, 16, generator=generator).requires_grad_()
    padding = torch.rand(N, L, generator=generator) < 0.3
    outputs = [y for y in call(x, padding) if y is not None]
    loss = sum(y.square().sum() for y in outputs)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(loss, [x, *module.parameters()]))


def assert_same_as_eager(compiled, call, module, N, L):
    eager, ours = (results_and_gradients(function, module, N, L) for function in (call, compiled))
    for x, expected in zip(ours, eager, strict=True):
        bound = tolerance(torch.float32, 0.0, expected.abs().max().item(), N * L)
        assert (x - expected).abs().max().item() <= bound


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_one_graph_serves_every_batch_and_length_with_eagers_numbers(arguments):
    module = MultiHeadAttention(16, 4, batch_first=True, add_bias_kv=True)
    counter = CompileCounterWithBackend("aot_eager")
    call = call_of(module, arguments)
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for N, L in SIZES:
        assert_same_as_eager(compiled, call, module, N, L)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * len(SIZES)
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("fused_mha" in target for target in targets), targets


def test_one_graph_serves_every_band_that_depends_on_the_lengths():
    def call(query, key, value):
        return fused_mha.attention(query, key, value, is_causal=True, causal_alignment="bottom_right").output

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for L, S in ((5, 9), (4, 40), (7, 8), (9, 5)):
        arguments = [torch.randn(2, length, 2, 4) for length in (L, S, S)]
        with fused_mha.backend("cpu"):
            expected = call(*arguments)
        assert torch.equal(compiled(*arguments), expected)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * len(frames)


def test_compiled_dropout_follows_the_seed():
    module = MultiHeadAttention(16, 4, dropout=0.5, batch_first=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 30, 16)

    def weights():
        return compiled(x, x, x, average_attn_weights=False)[1].detach()

    torch.manual_seed(1)
    first, second = weights(), weights()
    torch.manual_seed(1)
    assert torch.equal(weights(), first)
    assert not torch.equal(first, second)
    assert 0 < int((first == 0).sum()) < first.numel()


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_eagers_numbers_forward_and_backward():
    module = MultiHeadAttention(16, 4, batch_first=True)
    call = call_of(module, {"padding": True})
    compiled = torch.compile(call, backend="inductor", fullgraph=True, dynamic=True)
    for N, L in SIZES[:2]:
        assert_same_as_eager(compiled, call, module, N, L)


def test_an_exported_program_with_dynamic_sizes_runs_on_the_operator():
    block = Block().eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    example = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    program = torch.export.export(block, example, dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}))
    assert any("fused_mha.attention" in str(node.target) for node in program.graph.nodes)
    x, padding = torch.randn(3, 9, 16), torch.rand(3, 9) < 0.4
    ours, theirs = program.module()(x, padding), block(x, padding)
    assert (ours - theirs).abs().max().item() <= tolerance(torch.float32, 0.0, theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_traced_module_gives_eagers_numbers(need_weights):
    """But not its bits: torch multiplies in a trace."""
    block = Block(need_weights=need_weights).eval()
    example = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
    with torch.no_grad(), pytest.warns((DeprecationWarning, FutureWarning), match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(block, example, check_trace=False)
    assert "fused_mha::attention" in str(traced.inlined_graph)
    x, padding = torch.randn(2, 7, 16), torch.rand(2, 7) < 0.4
    ours, theirs = traced(x, padding), block(x, padding)
    assert (ours - theirs).abs().max().item() <= tolerance(torch.float32, 0.0, theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
class TestTransforms:
    """The reference core serves these, where autograd formulas of operators would give silent zeros."""

    def arguments(self):
        return make_arguments(
            dtype=torch.float64, mask_dtype=torch.float64, hidden=0.0, return_lse=True, need_weights=True
        )

    def function(self, arguments):
        names = ("query", "key", "value", "attn_mask")

        def results(*values):
            return tuple(fused_mha.attention(**arguments | dict(zip(names, values, strict=True))))

        return results, tuple(arguments[name] for name in names)

    def assert_close(self, ours, theirs, terms=1):
        bound = tolerance(torch.float64, 0.0, 2.0 * theirs.abs().max().item(), terms)
        assert (ours - theirs).abs().max().item() <= bound

    def test_grad_gives_the_gradients_of_the_library(self):
        arguments = self.arguments()
        function, values = self.function(arguments)
        expected = run_with_gradients(native_attention, arguments)
        generator = torch.Generator().manual_seed(7)  # as `run_with_gradients` draws them
        cotangents = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).double() for x in function(*values)]

        def loss(*inputs):
            return sum((x * c).sum() for x, c in zip(function(*inputs), cotangents, strict=True))

        for name, gradient in zip(
            ("query", "key", "value", "attn_mask"), torch.func.grad(loss, (0, 1, 2, 3))(*values), strict=True
        ):
            self.assert_close(gradient, expected[f"grad of {name}"], 100)

    def test_vmap_gives_what_a_loop_over_the_library_gives(self):
        function, values = self.function(self.arguments())
        stacked = tuple(torch.stack([x, x * 0.5, -x]) for x in values)
        for index, factor in enumerate((1.0, 0.5, -1.0)):
            mapped = torch.func.vmap(function)(*stacked)
            with fused_mha.backend("cpu"):
                alone = function(*(x * factor for x in values))
            for ours, theirs in zip(mapped, alone, strict=True):
                self.assert_close(ours[index], theirs)

    @pytest.mark.parametrize("which", range(4))
    def test_jvp_and_forward_mode_agree_with_the_librarys_gradients(self, which):
        function, values = self.function(self.arguments())
        generator = torch.Generator().manual_seed(1)
        tangent = torch.randn(values[which].shape, generator=generator, dtype=torch.float64)

        def of_one(x):
            return function(*values[:which], x, *values[which + 1 :])

        _, derivatives = torch.func.jvp(of_one, (values[which],), (tangent,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(values[which], tangent)
            duals = [torch.autograd.forward_ad.unpack_dual(x).tangent for x in of_one(dual)]
        duals = [torch.zeros_like(x) if dual is None else dual for x, dual in zip(derivatives, duals, strict=True)]
        leaf = values[which].clone().requires_grad_()
        with fused_mha.backend("cpu"):
            outputs = of_one(leaf)
        for output, derivative, other in zip(outputs, derivatives, duals, strict=True):
            self.assert_close(other, derivative)
            cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            gradient = torch.zeros_like(leaf)
            if output.requires_grad:  # weights and log-sum-exp are no functions of the values
                (gradient,) = torch.autograd.grad(output, leaf, cotangent, retain_graph=True)
            products = gradient * tangent  # <cotangent, J tangent> = <J^T cotangent, tangent>
            bound = tolerance(torch.float64, 0.0, products.abs().max().item() + derivative.abs().max().item(), 1000)
            assert abs((cotangent * derivative).sum() - products.sum()).item() <= bound
        if which < 2:
            assert all(bool((x != 0).any()) for x in derivatives)

    def test_hessian_by_forward_over_reverse_is_the_double_backward_of_the_library(self):
        small = {"N": 1, "L": 2, "S": 3, "H": 1, "H_kv": 1, "D": 2, "D_v": 2, "dtype": torch.float64}
        a = make_arguments(**small, mask_dtype=torch.float64, hidden=0.0)
        values = (a["query"],)

        def loss(query):
            return fused_mha.attention(**a | {"query": query}).output.sin().sum()

        ours = torch.func.hessian(loss)(values[0])
        with fused_mha.backend("cpu"):
            theirs = torch.autograd.functional.hessian(loss, values[0])
        self.assert_close(ours, theirs, 100)

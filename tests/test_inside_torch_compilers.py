"""The module under torch.fx, torch.jit.script, torch.compile and torch.export."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

import fused_mha
from calls import CALLS
from fused_mha import MultiHeadAttention
from fused_mha.testing import Case, assert_parity

# torch's compilers script some of their own code
pytestmark = [pytest.mark.usefixtures("fresh_compiler"), pytest.mark.filterwarnings("ignore:`torch.jit.script")]

ARGUMENTS = [
    {},
    {"need_weights": False},
    {"need_weights": False, "key_padding_mask": "bool"},
    {"average_attn_weights": False, "attn_mask": "float per head", "sharing": "separate"},
    {"need_weights": False, "attn_mask": "bool", "sharing": "cross", "add_bias_kv": True, "add_zero_attn": True},
    {"need_weights": False, "is_causal": True, "batch_first": False},
    {"kdim": 6, "vdim": 9, "sharing": "separate", "key_padding_mask": "float", "batched": False},
]


class Block(nn.Module):
    """A model that holds the module and works on its result."""

    def __init__(self, **arguments) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(8, 2, batch_first=True)
        self.arguments = arguments
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.attention(x, x, x, **self.arguments)
        return self.norm(x + output)


def test_symbolic_trace_keeps_the_module_as_one_leaf():
    block = Block(need_weights=False)
    graph = fx.symbolic_trace(block)
    leaves = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [node.target for node in leaves] == ["attention", "norm"]
    x = torch.randn(3, 5, 8)
    assert torch.equal(graph(x), block(x))
    assert graph.attention is block.attention


def test_symbolic_trace_keeps_masks_and_flags():
    class Masked(Block):
        def forward(self, x: Tensor, attn_mask: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
            output, weights = self.attention(
                x, x, x, padding, attn_mask=attn_mask, average_attn_weights=False, is_causal=True
            )
            return output, weights

    block = Masked()
    inputs = torch.randn(3, 5, 8), torch.randn(5, 5), torch.tensor([[False] * 4 + [True]] * 3)
    for result, expected in zip(fx.symbolic_trace(block)(*inputs), block(*inputs), strict=True):
        assert torch.equal(result, expected)


def test_symbolic_trace_of_the_module_as_the_root_raises():
    with pytest.raises(TraceError, match=r"MultiHeadAttention is a leaf of torch\.fx graphs, so it can't be the root"):
        fx.symbolic_trace(MultiHeadAttention(8, 2))


def test_traced_converted_encoder_layer_equals_torch():
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    fused_mha.convert(ours)

    class Outer(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer.self_attn

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x, need_weights=False)[0]

    assert_parity(fx.symbolic_trace(Outer(ours)), fx.symbolic_trace(Outer(theirs)), torch.randn(3, 5, 8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_script_of_a_converted_encoder_is_torchs_module_on_the_same_parameters(training):
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    ours = copy.deepcopy(theirs).train(training)
    fused_mha.convert(ours)
    copied = copy.deepcopy(ours)
    with pytest.warns(UserWarning, match=r"torch.jit.script puts torch.nn.MultiheadAttention in the place of"):
        scripted = torch.jit.script(copied)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(scripted(x), ours(x))
    assert all(type(layer.self_attn) is MultiHeadAttention for layer in ours.layers)  # a copy was scripted
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in copied.layers)
    assert all(not layer.self_attn._forward_pre_hooks for layer in copied.layers)
    assert len(fused_mha.convert(copied).changed) == 2
    torch.testing.assert_close(copied(x), ours(x))
    before = {name: parameter.data_ptr() for name, parameter in copied.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in scripted.named_parameters()} == before


def test_script_where_torchs_name_stands_for_our_class(monkeypatch):
    monkeypatch.setattr(nn, "MultiheadAttention", MultiHeadAttention)
    module = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8)
    with pytest.warns(UserWarning, match="in the place of"):
        scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(x, x, x), module(x, x, x))


@pytest.mark.thorough(one_in=2)
@pytest.mark.parametrize(
    ("back_end", "arguments"),
    [(name, a) for name, weights in CALLS for a in ARGUMENTS if a.get("need_weights", True) == weights],
    ids=str,
)
def test_compiled_module_agrees_with_torch_forward_and_backward(back_end, arguments):
    ours, theirs, inputs, forward_arguments = Case(**arguments).build()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    if arguments.get("is_causal"):  # torch needs the mask that the flag stands for
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        forward_arguments["attn_mask"] = mask
    with fused_mha.backend(back_end):
        _assert_same_as_eager(compiled, ours, inputs, forward_arguments)
        with torch.no_grad():
            _assert_same_as_eager(compiled, ours.eval(), inputs, forward_arguments)
            torch.testing.assert_close(compiled(*inputs, **forward_arguments), theirs(*inputs, **forward_arguments))


def _assert_same_as_eager(compiled, module: nn.Module, inputs, arguments) -> None:
    runs = []
    for call in (module, compiled):
        leaves = [x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs]
        results = [x for x in call(*leaves, **arguments) if x is not None]
        if torch.is_grad_enabled():
            loss = sum(x.square().sum() for x in results)
            results += torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
        runs.append(results)
    torch.testing.assert_close(runs[1], runs[0])


def test_compiled_module_follows_its_parameters():
    module, x = MultiHeadAttention(8, 2), torch.randn(5, 3, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    before = compiled(x, x, x)[0]
    with torch.no_grad():
        module.out_proj.weight.mul_(2.0)
        module.out_proj.bias.mul_(2.0)
    torch.testing.assert_close(compiled(x, x, x)[0], before * 2)


def test_compiled_module_runs_the_hooks_of_out_proj():
    module, x = MultiHeadAttention(8, 2), torch.randn(5, 3, 8)
    expected = module(x, x, x)[0] * 3
    module.out_proj.register_forward_hook(lambda _, args, output: output * 3)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], expected)


def test_compiled_converted_encoder_layer_has_one_graph():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fused_mha.convert(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 4 + [True]] * 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, src_key_padding_mask=padding), layer(x, src_key_padding_mask=padding))


@pytest.mark.parametrize(("back_end", "need_weights"), CALLS)
def test_compiled_module_with_dynamic_shapes_compiles_once(back_end, need_weights):
    module = MultiHeadAttention(8, 2, batch_first=True)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=counting, fullgraph=True, dynamic=True)
    for N, L, S in ((3, 5, 7), (4, 6, 9), (2, 11, 3)):
        query, key = torch.randn(N, L, 8), torch.randn(N, S, 8)
        padding = torch.arange(S) >= torch.randint(1, S, (N, 1))
        arguments = {"key_padding_mask": padding, "need_weights": need_weights}
        with fused_mha.backend(back_end):
            torch.testing.assert_close(compiled(query, key, key, **arguments), module(query, key, key, **arguments))
    assert len(graphs) == 1


@pytest.mark.parametrize("back_end", ["cpu", "sdpa"])
def test_module_compiled_by_inductor_agrees_forward_and_backward(back_end):
    ours, _, inputs, arguments = Case(need_weights=False, attn_mask="float", key_padding_mask="bool").build()
    compiled = torch.compile(ours, backend="inductor", fullgraph=True)
    with fused_mha.backend(back_end):
        _assert_same_as_eager(compiled, ours, inputs, arguments)


@pytest.mark.parametrize(("back_end", "need_weights"), CALLS)
def test_exported_module_with_dynamic_shapes_agrees(back_end, need_weights, request):
    if back_end == "reference" and torch.__version__ < (2, 13):
        request.applymarker(pytest.mark.xfail(reason="there torch.export refuses torch's own module too"))
    module = MultiHeadAttention(8, 2, batch_first=True).eval()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.attention(x, x, x, key_padding_mask=padding, need_weights=need_weights)

    shapes = {"x": {0: batch, 1: length}, "padding": {0: batch, 1: length}}
    with fused_mha.backend(back_end):
        program = torch.export.export(SelfAttention(), (x, padding), dynamic_shapes=shapes)
    for N, L in ((3, 5), (2, 9)):
        x, padding = torch.randn(N, L, 8), torch.arange(L) >= torch.randint(1, L, (N, 1))
        expected = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(program.module()(x, padding), expected)


def test_symbolic_trace_refuses_hooks_that_the_graph_would_run_twice():
    block = Block()
    handle = block.attention.register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))
    with pytest.raises(TraceError, match=r"has forward hooks, which a torch\.fx graph would run twice"):
        fx.symbolic_trace(block)
    handle.remove()
    fx.symbolic_trace(block)


def test_symbolic_trace_takes_a_module_of_which_only_the_mask_is_traced():
    class OwnInput(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.randn(2, 4, 8))

        def forward(self, attn_mask: Tensor) -> Tensor:
            return self.attention(self.x, self.x, self.x, attn_mask=attn_mask)[0]

    model, mask = OwnInput(), torch.randn(4, 4)
    assert torch.equal(fx.symbolic_trace(model)(mask), model(mask))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
@pytest.mark.parametrize(("back_end", "need_weights"), CALLS)
def test_jit_trace_holds_at_other_sizes(back_end, need_weights):
    block = Block(need_weights=need_weights)
    with fused_mha.backend(back_end):
        traced = torch.jit.trace(block, torch.randn(2, 5, 8))
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(traced(x), block(x))


@pytest.mark.parametrize("need_weights", [False, True])
def test_jvp_under_compile_gives_the_eager_tangent(need_weights):
    module, x, tangent = MultiHeadAttention(8, 2), torch.randn(3, 2, 8), torch.randn(3, 2, 8)

    def directional_derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: module(y, y, y, need_weights=need_weights)[0], (x,), (tangent,))[1]

    compiled = torch.compile(directional_derivative, backend="aot_eager")
    torch.testing.assert_close(compiled(x), directional_derivative(x))


@pytest.mark.parametrize("back_end", ["cpu", "reference"])
def test_tensor_subclasses_are_not_written_to_in_inference(back_end):
    class Traced(Tensor):
        """A subclass that knows no out= arguments, as DTensor."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert "out" not in (kwargs or {})
            return super().__torch_function__(function, types, args, kwargs or {})

    module, x = MultiHeadAttention(8, 2), torch.randn(3, 2, 8)
    with torch.no_grad(), fused_mha.backend(back_end):
        plain = module(x, x, x)
        y = x.as_subclass(Traced)
        for mine, expected in zip(module(y, y, y), plain, strict=True):
            torch.testing.assert_close(mine.as_subclass(Tensor), expected)

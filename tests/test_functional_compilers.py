"""`fused_mha.attention` under torch.compile and torch.export."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

import fused_mha
from attention_oracle import BACKENDS, SERVE_EVERYTHING, make_arguments, run_with_gradients
from fused_mha.backends import arguments
from fused_mha.core import dispatch

pytestmark = pytest.mark.usefixtures("fresh_compiler")

WITHOUT_WEIGHTS = {
    "plain": {},
    "causal": {"is_causal": True, "H_kv": 1},
    "virtual keys": {"bias_kv": True, "add_zero_attn": True},
    "masks": {"mask_dtype": torch.float32, "padding_dtype": torch.bool},
}
EVERYTHING = {"need_weights": True, "average_attn_weights": False, "return_lse": True}
WITH_WEIGHTS = {
    "averaged weights": {"need_weights": True},
    "averaged weights, virtual keys": {"need_weights": True, "bias_kv": True, "add_zero_attn": True},
    "everything, window": EVERYTHING | {"window": (2, 1), "causal_alignment": "bottom_right"},
    "weights of some heads": {"weights_of_heads": (2, 0), "bias_kv": True, "return_lse": True},
    "softcap, sinks and ALiBi": {
        "softcap": 1.5,
        "of_heads": ("sinks", "alibi_slopes"),
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "everything, virtual keys": EVERYTHING | {"bias_kv": True, "add_zero_attn": True},
}
CALLS = pytest.mark.parametrize(
    ("backend", "call"),
    [
        *((backend, call) for call in WITHOUT_WEIGHTS.values() for backend in BACKENDS),
        *((backend, call) for call in WITH_WEIGHTS.values() for backend in SERVE_EVERYTHING),
    ],
    ids=[
        *(f"{name}-{backend}" for name in WITHOUT_WEIGHTS for backend in BACKENDS),
        *(f"{name}-{backend}" for name in WITH_WEIGHTS for backend in SERVE_EVERYTHING),
    ],
)


class Attention(nn.Module):
    """`attention` as a module, for torch.export."""

    def __init__(self, flags: dict) -> None:
        super().__init__()
        self.flags = flags

    def forward(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [x for x in fused_mha.attention(**tensors, **self.flags) if x is not None]


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("is_around", [False, True], ids=["", "in another"])
def test_a_back_end_is_forced_inside_a_compiled_function(is_around, fullgraph, monkeypatch):
    # As in a thread that has forced none before. A real one that compiles and ends breaks later compilations in the
    # CUDA build of torch 2.10 where there is no GPU: its device guard is a local of the thread.
    monkeypatch.setattr(dispatch, "_override", type(dispatch._override)())
    operators = []

    def graph_of(graph, _):
        operators.append([str(node.target) for node in graph.graph.nodes if "fused_mha" in str(node.target)])
        return graph

    @torch.compile(backend=graph_of, fullgraph=fullgraph)
    def compiled(query, key, value):
        free = fused_mha.attention(query, key, value)
        with fused_mha.backend("reference"):
            forced = fused_mha.attention(query, key, value)
        return free.output, forced.output

    def call_twice():
        for L in (5, 7):
            arguments = make_arguments(L=L)
            with fused_mha.backend("cpu") if is_around else contextlib.nullcontext():
                results = compiled(*(arguments[name] for name in ("query", "key", "value")))
            torch.testing.assert_close(*results)

    call_twice()
    call_twice()
    assert operators == [["fused_mha.attention.default"]] * len(operators) != []


def test_dropout_compiles_before_and_after_calls_of_some_heads(monkeypatch):
    monkeypatch.setattr(arguments, "_place", type(arguments._place)())  # as in a thread whose calls were of all heads
    x = torch.ones(1, 4, 2, 8)

    @torch.compile(fullgraph=True, backend="eager")
    def of_all(x):
        return fused_mha.attention(x, x, x, dropout_p=0.5).output

    @torch.compile(fullgraph=True, backend="eager")
    def of_some(x):
        with arguments.heads_of_a_longer_call(0, 4):
            return fused_mha.attention(x, x, x, dropout_p=0.5).output

    for call in (of_all, of_some) * 2:
        assert call(x).shape == x.shape


@pytest.mark.thorough(one_in=2)
@CALLS
def test_compiled_attention_takes_other_lengths_forward_and_backward(backend, call):
    compiled = torch.compile(fused_mha.attention, backend="aot_eager", fullgraph=True)
    with fused_mha.backend(backend):
        for L, S in ((4, 6), (5, 9), (7, 3)):
            arguments = make_arguments(L=L, S=S, **call)
            runs = [run_with_gradients(function, arguments) for function in (fused_mha.attention, compiled)]
            torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.thorough(one_in=2)
@pytest.mark.parametrize("heads", [{"H": 4, "H_kv": 2}, {"H": 2, "H_kv": 2}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_attention_takes_symbols_for_all_sizes(backend, heads):
    compiled = torch.compile(fused_mha.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    arguments = make_arguments(**heads)
    with fused_mha.backend(backend):
        torch.testing.assert_close(compiled(**arguments).output, fused_mha.attention(**arguments).output)


# By the fused core: a reshape of the others, as in torch's own module, ties torch.export to the virtual keys' number.
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_attention_takes_a_mask_that_is_larger_than_the_query(backend):
    arguments = make_arguments(L=9, S=9, D=4, mask_dtype=torch.bool, mask_shape="4D NHLS")
    with fused_mha.backend(backend):
        compiled = torch.compile(fused_mha.attention, fullgraph=True, backend="aot_eager")
        runs = [run_with_gradients(function, arguments) for function in (fused_mha.attention, compiled)]
    torch.testing.assert_close(runs[1], runs[0])


@pytest.mark.parametrize("call", (WITHOUT_WEIGHTS | WITH_WEIGHTS).values(), ids=WITHOUT_WEIGHTS | WITH_WEIGHTS)
def test_exported_attention_takes_other_lengths(call):
    L, S = (torch.export.Dim(name, min=2) for name in "LS")
    dynamic = {
        "query": {1: L},
        "key": {1: S},
        "value": {1: S},
        "attn_mask": {0: L, 1: S},
        "key_padding_mask": {1: S},
        "bias_k": {},
        "bias_v": {},
        "sinks": {},
        "alibi_slopes": {},
    }

    def split(**sizes):
        arguments = make_arguments(**sizes, **call)
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        return tensors, {name: x for name, x in arguments.items() if name not in tensors}

    tensors, flags = split(L=4, S=6)
    shapes = {"tensors": {name: dynamic[name] for name in tensors}}
    with fused_mha.backend("cpu"):
        program = torch.export.export(Attention(flags), (tensors,), dynamic_shapes=shapes).module()
        for sizes in ({"L": 4, "S": 6}, {"L": 9, "S": 7}):
            tensors, _ = split(**sizes)
            for result, expected in zip(program(tensors), Attention(flags)(tensors), strict=True):
                torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("is_on", [True, False])
def test_compiled_attention_follows_autocast(is_on):
    arguments = make_arguments(need_weights=True)
    compiled = torch.compile(fused_mha.attention, backend="aot_eager", fullgraph=True)
    compiled(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
        output = compiled(**arguments).output
        assert output.dtype == (torch.bfloat16 if is_on else torch.float32)
        torch.testing.assert_close(output, fused_mha.attention(**arguments).output)

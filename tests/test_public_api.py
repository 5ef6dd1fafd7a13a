"""The public names, their signatures and docstrings, and what the package ships."""

import copy
import doctest
import importlib
import inspect
import types
from importlib.metadata import version
from importlib.resources import files

import pytest
import torch
from hypothesis import given
from torch import nn

import fused_mha
import fused_mha.parallel
import fused_mha.testing
from attention_oracle import DEFAULTS
from fused_mha.testing import strategies

NAMES = [
    "AttentionResult",
    "ConversionReport",
    "Explanation",
    "KeyValueCache",
    "LinearScaling",
    "Llama3Scaling",
    "MultiHeadAttention",
    "NTKScaling",
    "RotaryEmbedding",
    "ServedCalls",
    "YaRNScaling",
    "attention",
    "backend",
    "convert",
    "explain",
    "pack",
    "pool_key_heads",
    "revert",
    "scaled_dot_product_attention",
    "serve_sdpa",
    "unpack",
    "varlen_attention",
    "warm_up",
]
TESTING_NAMES = ["Case", "Comparison", "assert_parity", "compare", "grid", "tolerance"]
PARALLEL_NAMES = ["HeadwiseParallel", "context_parallel", "ring_attention", "shard", "unshard"]
STRATEGIES = ["calls", "cases", "fast_path_cases", "inputs", "masks"]
PUBLIC = [(fused_mha, name) for name in NAMES] + [(fused_mha.testing, name) for name in TESTING_NAMES]
FUNCTIONS = [
    fused_mha.MultiHeadAttention,
    fused_mha.KeyValueCache,
    fused_mha.RotaryEmbedding,
    fused_mha.LinearScaling,
    fused_mha.NTKScaling,
    fused_mha.YaRNScaling,
    fused_mha.Llama3Scaling,
    fused_mha.pool_key_heads,
    fused_mha.attention,
    fused_mha.varlen_attention,
    fused_mha.pack,
    fused_mha.unpack,
    fused_mha.backend,
    fused_mha.convert,
    fused_mha.explain,
    fused_mha.revert,
    fused_mha.scaled_dot_product_attention,
    fused_mha.serve_sdpa.report,
    fused_mha.warm_up,
    fused_mha.testing.assert_parity,
    fused_mha.testing.compare,
    fused_mha.testing.grid,
    fused_mha.testing.tolerance,
    *(getattr(fused_mha.parallel, name) for name in PARALLEL_NAMES),
]


def described(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("package", "names"),
    [(fused_mha, NAMES), (fused_mha.parallel, PARALLEL_NAMES), (fused_mha.testing, TESTING_NAMES)],
    ids=["fused_mha", "parallel", "testing"],
)
def test_exact_public_names(package, names):
    assert sorted(package.__all__) == names
    visible = [
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert sorted(visible) == names


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_docstring_says_what_it_is(package, name):
    docstring = inspect.getdoc(getattr(package, name))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":"))
    assert not docstring.startswith(f"{name}(")  # what a NamedTuple has without one


WITH_EXAMPLES = [*PUBLIC, *((strategies, name) for name in STRATEGIES)]
OF_THE_PROCESSOR = ("explain", "serve_sdpa")  # what their examples print


@pytest.mark.parametrize(("package", "name"), WITH_EXAMPLES, ids=[name for _, name in WITH_EXAMPLES])
def test_the_example_runs_and_prints_what_it_says(package, name):
    ours, theirs = (cls(16, 4) for cls in (fused_mha.MultiHeadAttention, nn.MultiheadAttention))
    known = {"torch": torch, "nn": nn, "copy": copy, "fused_mha": fused_mha, "strategies": strategies, "given": given}
    known |= {"ours": ours, "theirs": theirs, "module": ours, "x": torch.randn(5, 2, 16)}
    docstring = inspect.getdoc(getattr(package, name))
    example = doctest.DocTestParser().get_doctest(docstring, known, name, None, None)
    assert example.examples
    checker = doctest.OutputChecker()
    if name in OF_THE_PROCESSOR:
        checker.check_output = lambda *_: True
    told = []
    doctest.DocTestRunner(checker).run(example, out=told.append)
    assert told == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstring_names_every_argument(function):
    docstring = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        assert f"\n    {stars}{parameter.name}: " in docstring, parameter


def test_compare_takes_what_assert_parity_takes():
    assert described(fused_mha.testing.compare) == described(fused_mha.testing.assert_parity)


def test_methods_of_the_module_have_docstrings_of_their_own():
    for name in ("forward", "reset_parameters", "load_state_dict"):
        assert vars(fused_mha.MultiHeadAttention)[name].__doc__, name


@pytest.mark.parametrize("method", ["__init__", "forward", "merge_masks"])
def test_signatures_are_torchs_and_what_is_more_is_off(method):
    ours, theirs = (described(getattr(cls, method)) for cls in (fused_mha.MultiHeadAttention, nn.MultiheadAttention))
    assert ours[: len(theirs)] == theirs
    for name, kind, default in ours[len(theirs) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY, name
        assert default in (None, False), name


def test_signature_of_attention():
    parameters = inspect.signature(fused_mha.attention).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert positional == ["query", "key", "value"]
    assert keywords == DEFAULTS


def test_is_a_subclass_of_torchs_module():
    assert issubclass(fused_mha.MultiHeadAttention, nn.MultiheadAttention)


def test_py_typed_is_shipped():
    assert (files("fused_mha") / "py.typed").is_file()


def test_version_is_the_distributions():
    assert fused_mha.__version__ == version("fused-mha")


@pytest.mark.parametrize("name", ["fused_mha.benchmark.command", "fused_mha.info", "fused_mha.parity.command"])
def test_commands_have_a_main(name):
    assert callable(importlib.import_module(name).main)

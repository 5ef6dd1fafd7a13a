"""Imports go one way: which file of the package may import which, as one table."""

import ast
import sys
from pathlib import Path

import pytest

import fused_mha

PACKAGE = Path(fused_mha.__file__).parent

# From the top down. "" is the package itself, fused_mha/__init__.py; a file that is not listed fails.
ALLOWED = {
    "": {
        "convert",
        "core.dispatch",
        "module.explanation",
        "core.attention",
        "core.inputs",
        "core.packing",
        "core.varlen",
        "integrations.sdpa",
        "module.cache",
        "module.loading",
        "module.multi_head_attention",
        "module.rotary",
        "warm_up",
    },
    "__main__": set(),
    "parity": set(),
    "parity.__main__": {"parity.command"},
    "parity.command": {"", "parity.model", "parity.results", "testing"},
    "parity.model": {"", "convert", "parity.results", "testing", "testing.cases"},
    "parity.results": {"testing", "testing.cases"},
    "benchmark": set(),
    "benchmark.__main__": {"benchmark.command"},
    "benchmark.command": {
        *(f"benchmark.{name}" for name in ("comparison", "harness", "memory", "module_cells", "outcome", "peers")),
        *(f"benchmark.{name}" for name in ("plot", "processes", "suites", "yardsticks")),
    },
    "benchmark.outcome": {*(f"benchmark.{name}" for name in ("comparison", "harness", "peers"))},
    "benchmark.comparison": {"benchmark.harness"},
    "benchmark.suites": {
        *(f"benchmark.{name}" for name in ("attention_cases", "attention_cells", "cuda_cases")),
        *(f"benchmark.{name}" for name in ("harness", "module_cases", "module_cells")),
    },
    "benchmark.plot": {"benchmark.harness"},
    "benchmark.peers": {
        *(f"benchmark.{name}" for name in ("attention_cases", "harness", "module_cells")),
        *(f"benchmark.{name}" for name in ("onnx_runtime", "open_vino", "processes")),
    },
    "benchmark.onnx_runtime": {
        *(f"benchmark.{name}" for name in ("attention_cases", "attention_cells", "module_cells"))
    },
    "benchmark.open_vino": {"benchmark.module_cells"},
    "benchmark.processes": {"benchmark.harness"},
    "benchmark.cuda_cases": {*(f"benchmark.{name}" for name in ("harness", "module_cases", "module_cells"))},
    "benchmark.module_cases": {
        *(f"benchmark.{name}" for name in ("attention_cells", "harness", "module_cells")),
        "testing",
    },
    "benchmark.module_cells": {"module.multi_head_attention"},
    "benchmark.attention_cases": {
        *(f"benchmark.{name}" for name in ("attention_cells", "harness")),
        *("core.attention", "testing"),
    },
    "benchmark.attention_cells": {"backends.cpu", "core.attention", "ops.schema"},
    "benchmark.yardsticks": {"benchmark.harness"},
    "benchmark.harness": {"", "benchmark.processor"},
    "benchmark.processor": {"backends.cpu"},
    "benchmark.memory": set(),
    "benchmark.traffic": set(),
    "info": {"", "backends.cpu", "backends.triton", "core.dispatch"},
    "testing": {"testing.cases", "testing.parity", "testing.tolerances"},
    "testing.cases": {"module.multi_head_attention"},
    "testing.parity": {"core.dispatch", "module.multi_head_attention", "testing.tolerances"},
    "testing.strategies": {"testing.cases"},
    "testing.tolerances": set(),
    "convert": {"module.multi_head_attention"},
    "warm_up": {
        *("backends.triton", "module.multi_head_attention"),
        *("core.attention", "core.plans", "core.varlen"),
    },
    "integrations": set(),
    "integrations.sdpa": {
        "backends.sdpa",
        *(f"core.{name}" for name in ("attention", "dispatch", "inputs", "modes")),
    },
    "integrations.transformers": {
        *("core.attention", "integrations.lazy_mask", "integrations.transformers_masks"),
    },
    "integrations.transformers_cache": {"module.cache"},
    "integrations.transformers_masks": {"core.inputs", "core.masks", "integrations.lazy_mask"},
    "integrations.lazy_mask": {"core.inputs", "core.masks"},
    "parallel": {"parallel.context", "parallel.ring", "parallel.tensor", "parallel.zigzag"},
    "parallel.context": {
        *("core.inputs", "module.arguments", "module.cache", "module.multi_head_attention", "module.steps"),
        *("parallel.groups", "parallel.ring", "parallel.zigzag"),
    },
    "parallel.ring": {
        *("backends.arguments", "backends.capability", "backends.cpu", "backends.triton"),
        *("core.inputs", "core.modes", "ops.schema", "parallel.groups", "parallel.zigzag"),
    },
    "parallel.tensor": {
        *("backends.arguments", "module.arguments", "module.cache", "module.linear", "module.multi_head_attention"),
        *("module.options", "module.projections", "parallel.groups"),
    },
    "parallel.zigzag": {"parallel.groups"},
    "parallel.groups": set(),
    "module": set(),
    "module.explanation": {
        "backends.delegation",
        "core.dispatch",
        "integrations.sdpa",
        "module.arguments",
        "module.cache",
        "module.linear",
        "module.multi_head_attention",
        "module.nested",
        "module.one_call",
        "module.steps",
    },
    "module.multi_head_attention": {
        *("core.heads", "core.inputs", "core.memory"),
        *(f"module.{name}" for name in ("arguments", "cache", "decoding", "loading", "nested", "one_call")),
        *(f"module.{name}" for name in ("options", "projections", "quantization", "rotary", "steps")),
    },
    "module.decoding": {
        *("backends.cpu", "core.dispatch", "core.memory", "core.modes"),
        *(f"module.{name}" for name in ("arguments", "cache", "linear", "one_call", "steps")),
    },
    "module.steps": {
        *("core.heads", "core.inputs", "core.masks", "core.plans"),
        *(f"module.{name}" for name in ("arguments", "cache", "heads", "linear", "one_call", "options")),
        *("module.projections", "module.rotary"),
    },
    "module.cache": {"core.modes"},
    "module.loading": {"module.options"},
    "module.options": {"core.heads", "core.inputs", "core.modes", "module.rotary"},
    "module.rotary": {"core.heads", "core.modes", "module.heads"},
    "module.heads": {"backends.cpu", "core.dispatch", "core.heads", "core.memory", "core.modes", "ops.heads"},
    "module.one_call": {
        "core.packing",
        *("backends.arguments", "backends.capability", "backends.cpu", "ops.module"),
        *(
            "core.dispatch",
            "core.inputs",
            "module.arguments",
            "module.linear",
            "core.masks",
            "core.memory",
            "core.modes",
            "core.plans",
            "module.projections",
        ),
    },
    "core": set(),
    "core.attention": {"core.dispatch", "core.inputs", "core.modes", "core.plans"},
    "core.varlen": {"core.inputs", "core.modes", "core.plans"},
    "core.packing": set(),
    "core.plans": {"backends.capability", "core.dispatch", "core.inputs", "core.memory", "core.modes"},
    "module.nested": {
        *("backends.capability", "backends.cpu", "backends.triton"),
        *("core.modes", "core.varlen", "module.arguments"),
    },
    "module.arguments": {"core.inputs", "core.modes"},
    "module.quantization": set(),
    "module.projections": {"module.arguments", "module.linear", "core.masks", "core.modes"},
    "module.linear": {"backends.cpu", "core.dispatch", "core.memory", "core.modes"},
    "core.dispatch": {
        "backends.capability",
        "backends.cpu",
        "backends.sdpa",
        "backends.triton",
        "core.inputs",
        "core.masks",
        "core.modes",
        "core.reference",
    },
    "backends": set(),
    "backends.cpu": {
        "backends.arguments",
        "backends.capability",
        "backends.native",
        "backends.sdpa",
        "core.inputs",
        "core.memory",
        "core.modes",
        "ops.autograd",
        "ops.gradients",
        "ops.module",
        "ops.module_autograd",
        "ops.heads",
        "ops.product",
        "ops.schema",
    },
    "backends.native": set(),
    "backends.triton": {
        "backends.arguments",
        "backends.capability",
        "backends.triton.assembler",
        "backends.triton.eager",
        "backends.delegation",
        "backends.triton.launch",
        "backends.triton.module",
        "backends.triton.tile_config",
        "core.inputs",
        "core.memory",
        "ops.fallback",
        "ops.module",
        "ops.schema",
    },
    "backends.triton.module": {
        *(f"backends.triton.{name}" for name in ("finite", "launch", "preparation")),
        *("core.memory", "core.modes", "ops.module", "ops.module_autograd", "ops.schema"),
    },
    "backends.triton.finite": {f"backends.triton.{name}" for name in ("launcher", "readable", "tile_config", "tiles")},
    "backends.triton.eager": {
        "backends.arguments",
        "backends.triton.launch",
        "core.inputs",
        "core.memory",
        "core.modes",
        "ops.gradients",
        "ops.schema",
    },
    "backends.triton.launch": {
        *(f"backends.triton.{name}" for name in ("backward", "forward", "gradient_tile", "weights")),
        *(f"backends.triton.{name}" for name in ("launcher", "preparation", "readable")),
        *(f"backends.triton.{name}" for name in ("tile_config", "tiles", "visibility")),
        "backends.delegation",
        "core.memory",
        "ops.gradients",
        "ops.schema",
    },
    "backends.triton.launcher": {f"backends.triton.{name}" for name in ("entry", "tile_config", "tiles")},
    "backends.triton.preparation": {
        "core.inputs",
        "core.memory",
        *(f"backends.triton.{name}" for name in ("assembler", "packed", "readable", "tile_config")),
        *(f"backends.triton.{name}" for name in ("tiles", "visibility")),
        "ops.schema",
    },
    "backends.triton.readable": {"backends.triton.tiles", "core.memory", "ops.schema"},
    "backends.triton.assembler": set(),
    "backends.triton.entry": {f"backends.triton.{name}" for name in ("assembler", "packed", "tiles")},
    "backends.triton.backward": {
        f"backends.triton.{name}" for name in ("gradient_tile", "scores", "tiles", "visibility")
    },
    "backends.triton.gradient_tile": {"backends.triton.scores", "backends.triton.tiles"},
    "backends.triton.forward": {f"backends.triton.{name}" for name in ("scores", "tiles", "visibility")},
    "backends.triton.weights": {f"backends.triton.{name}" for name in ("scores", "tiles", "visibility")},
    "backends.triton.scores": {"backends.triton.tiles"},
    "backends.triton.visibility": {"backends.triton.tiles"},
    "backends.triton.tiles": set(),
    "backends.triton.packed": set(),
    "backends.triton.tile_config": set(),
    "backends.arguments": {"core.inputs", "core.masks", "ops.schema"},
    "backends.sdpa": {
        *("backends.capability", "backends.delegation", "core.inputs", "core.masks", "core.memory"),
        *("core.modes", "ops.module", "ops.schema", "core.reference"),
    },
    "backends.delegation": {"core.inputs", "core.modes", "ops.module"},
    "backends.capability": {"core.inputs", "core.modes", "ops.module"},
    "ops": {
        "ops.autograd",
        "ops.fake",
        "ops.fallback",
        "ops.heads",
        "ops.module",
        "ops.module_autograd",
        "ops.product",
    },
    "ops.autograd": {"ops.fallback", "ops.schema"},
    "ops.fake": {"ops.flop_counter", "ops.schema"},
    "ops.fallback": {"core.masks", "core.modes", "ops.schema", "core.reference"},
    "ops.flop_counter": set(),
    "ops.gradients": {"ops.schema"},
    "ops.module": {"ops.flop_counter", "ops.schema"},
    "ops.module_autograd": {"core.masks", "ops.module", "ops.product", "ops.schema"},
    "ops.product": {"ops.flop_counter", "ops.schema"},
    "ops.heads": {"core.heads", "ops.gradients", "ops.schema"},
    "ops.schema": set(),
    "core.reference": {"core.masks", "core.modes"},
    "core.inputs": set(),
    "core.masks": set(),
    "core.heads": set(),
    "core.modes": {"core.memory"},
    "core.memory": set(),
}
THIRD_PARTY = {  # of every other file torch alone
    "parity.command": {"torch", "tqdm"},
    "testing.strategies": {"torch", "hypothesis"},
    "benchmark.command": {"torch", "tqdm"},
    "benchmark.plot": {"matplotlib"},
    "integrations.transformers_cache": {"torch", "transformers"},
    **{f"backends.triton.{name}": {"torch", "triton"} for name in ("assembler", "finite", "launcher")},
    "backends.triton.packed": {"triton"},
    **{
        f"backends.triton.{name}": {"triton"}
        for name in ("backward", "entry", "forward", "gradient_tile", "scores", "tiles", "visibility", "weights")
    },
}
ON_TOP = {
    *("", "info", "convert", "module.explanation", "warm_up"),
    *(name for name in ALLOWED if name.split(".")[0] in ("benchmark", "integrations", "parallel", "parity", "testing")),
}


def module_names():
    """Dotted names below fused_mha, with their files."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in PACKAGE.rglob("*.py")
    }


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def runtime_nodes(node):
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for branch in child.orelse:
                yield branch
                yield from runtime_nodes(branch)
        else:
            yield child
            yield from runtime_nodes(child)


def imports_of(source, name, names, is_package=False):
    """What a source imports at run time: modules below fused_mha, and the top names of everything else."""
    own, others = set(), set()

    def add(dotted):
        top, _, rest = dotted.partition(".")
        if top == "fused_mha":
            own.add(rest)
        else:
            others.add(top)

    parents = ["fused_mha", *filter(None, name.split("."))]
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = parents[: len(parents) - node.level + is_package]
                module = ".".join([*base, *filter(None, [module])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}".removeprefix("fused_mha").removeprefix(".")
                is_submodule = module.split(".")[0] == "fused_mha" and submodule in names
                add(f"fused_mha.{submodule}" if is_submodule else module)
    return own, others


def forbidden(name, source, *, is_package=False):
    """What the table does not allow of one file, as lines."""
    if name not in ALLOWED:
        return [f"{name} is not in the table"]
    own, _ = imports_of(source, name, set(ALLOWED), is_package)
    return [f"{name} imports {other}" for other in sorted(own - ALLOWED[name])]


def real_sources():
    return {name: (path.read_text(encoding="utf-8"), path.stem == "__init__") for name, path in module_names().items()}


def test_every_import_is_allowed():
    problems = [forbidden(name, source, is_package=is_package) for name, (source, is_package) in real_sources().items()]
    assert [line for lines in problems for line in lines] == []


def test_table_lists_no_file_and_no_import_that_is_gone():
    sources = real_sources()
    assert set(ALLOWED) == set(sources)
    for name, (source, is_package) in sources.items():
        own, _ = imports_of(source, name, set(ALLOWED), is_package)
        assert own == ALLOWED[name], name


def test_the_core_never_imports_what_stands_on_top():
    for name, allowed in ALLOWED.items():
        if name not in ON_TOP:
            assert not allowed & ON_TOP, name


def test_no_cycles():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        path.append(name)
        for other in ALLOWED[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in ALLOWED:
        visit(name)
    assert done == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_third_party_imports_are_torch_and_the_few_that_are_listed(name):
    path = module_names()[name]
    _, others = imports_of(path.read_text(encoding="utf-8"), name, set(ALLOWED), path.stem == "__init__")
    assert others - sys.stdlib_module_names <= THIRD_PARTY.get(name, {"torch"})


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("core.reference", "import fused_mha.core.dispatch", "core.reference imports core.dispatch"),
        ("core.reference", "from fused_mha.core import inputs", "core.reference imports core.inputs"),
        ("core.reference", "from fused_mha.core.inputs import AttentionInputs", "core.reference imports core.inputs"),
        ("core.reference", "from . import dispatch", "core.reference imports core.dispatch"),
        ("core.reference", "from .dispatch import run", "core.reference imports core.dispatch"),
        ("backends.sdpa", "from ..core.attention import attention", "backends.sdpa imports core.attention"),
        ("backends.native", "from fused_mha.backends import cpu", "backends.native imports backends.cpu"),
        ("ops.fallback", "from fused_mha.backends.native import load", "ops.fallback imports backends.native"),
        ("ops.schema", "from .autograd import attention", "ops.schema imports ops.autograd"),
        ("core.masks", "def f():\n    from fused_mha import convert", "core.masks imports convert"),
        ("core.masks", "from fused_mha import __version__", "core.masks imports "),
        ("core.masks", "if not TYPE_CHECKING:\n    pass\nelse:\n    import fused_mha.info", "core.masks imports info"),
        (
            "core.dispatch",
            "try:\n    import fused_mha.testing.parity\nexcept ImportError:\n    pass",
            "core.dispatch imports testing.parity",
        ),
        ("utilities", "", "utilities is not in the table"),
    ],
)
def test_a_forbidden_import_is_found(name, source, problem):
    assert forbidden(name, source) == [problem]


@pytest.mark.parametrize(
    "source",
    [
        "if TYPE_CHECKING:\n    from fused_mha.core.inputs import Window",
        "from fused_mha.core import masks",
        "import torch.nn",
    ],
)
def test_allowed_imports_are_not_found(source):
    assert forbidden("core.reference", source) == []

"""Imports go one way, as `import_table` says: no file imports what stands above it."""

import ast
import sys
from pathlib import Path

import pytest

import fused_mha
from import_table import ALLOWED, ON_TOP, THIRD_PARTY

PACKAGE = Path(fused_mha.__file__).parent


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

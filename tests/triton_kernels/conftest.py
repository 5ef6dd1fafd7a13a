"""The Triton kernels under Triton's interpreter, which runs them on the CPU; `tests/conftest.py` turns it on."""

import dataclasses
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def without_numpys_warnings():
    """The interpreter computes by NumPy, which warns of what `tl.where` then discards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def language_is_patched_once(monkeypatch):
    """In each launch: the interpreter would do it anew in every call of a function, for nearly half of its time."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    @functools.cache
    def languages(function):
        modules = (interpreter.tl, interpreter.tl.core)
        return {module.__name__ for module in function.__globals__.values() if any(module is m for m in modules)}

    def patch_once(function):
        if languages(function) <= patched:
            return None
        patched.update(languages(function))
        return patch(function)

    def launch_unpatched(*arguments, **keywords):
        patched.clear()
        return launch(*arguments, **keywords)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_unpatched)


@pytest.fixture(autouse=True)
def types_are_looked_up_once(monkeypatch):
    """NumPy's for each of Triton's: the interpreter makes the whole table anew for every tensor."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    look_up = interpreter._get_np_dtype
    looked_up = functools.cache(look_up)

    def look_up_once(of):
        return look_up(of) if of.scalar.is_ptr() else looked_up(of.scalar)

    monkeypatch.setattr(interpreter, "_get_np_dtype", look_up_once)


@pytest.fixture(autouse=True)
def integers_are_unchecked(monkeypatch):
    """The interpreter looks for overflow in each operation, for a third of its time: `integers_are_checked` does."""
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


@pytest.fixture
def integers_are_checked(integers_are_unchecked, monkeypatch):
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))


@pytest.fixture
def attention(monkeypatch):
    """`fused_mha.attention` on CPU tensors, computed by the Triton kernels, gradients too."""
    if torch.cuda.is_available():
        pytest.skip("tests/cuda runs the kernels on the GPU")
    import fused_mha
    from fused_mha.backends import cpu
    from fused_mha.backends.triton import launch

    def attention(**arguments):
        with fused_mha.backend("cpu"):
            return fused_mha.attention(**arguments)

    monkeypatch.setattr(cpu, "_forward", launch.attention)
    monkeypatch.setattr(cpu, "_backward", launch.attention_backward)
    return attention


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors of the CPU stand for those of a GPU: the CPU's back end has the kernels and the plans of `triton`."""
    if torch.cuda.is_available():
        pytest.skip("tests/cuda calls the kernels on the GPU")
    from fused_mha.backends import cpu, triton
    from fused_mha.backends.triton import launch
    from fused_mha.core import dispatch, plans

    stands_in = cpu.BACKEND._replace(served=triton.BACKEND.served, leaves=lambda _: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (stands_in, *dispatch.BACKENDS[1:]))
    monkeypatch.setattr(cpu, "_forward", launch.attention)
    monkeypatch.setattr(cpu, "_backward", launch.attention_backward)
    monkeypatch.setattr(plans, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "_plans", {})
    plans.forget()
    yield
    plans.forget()


@pytest.fixture
def in_general(monkeypatch):
    """`attention` by the general way."""

    import fused_mha
    from fused_mha.core import plans

    def attention(**arguments):
        with monkeypatch.context() as patch:
            patch.setattr(plans, "DEVICE", "cuda")
            return fused_mha.attention(**arguments)

    return attention


@pytest.fixture
def launches(monkeypatch):
    """What `launcher.run` and `static_launch` are given; the first returns `compiled`."""
    from fused_mha.backends.triton import launcher

    found = SimpleNamespace(by_triton=[], by_address=[], compiled=None)

    def run(kernel, programs, how, call, *operands_and_tile):
        found.by_triton.append((kernel, programs, how, call, operands_and_tile))
        return found.compiled

    monkeypatch.setattr(launcher, "run", run)
    monkeypatch.setattr(launcher, "static_launch", lambda *arguments: found.by_address.append(arguments))
    monkeypatch.setattr(launcher, "_current_stream", lambda device: 100 + device)
    return found

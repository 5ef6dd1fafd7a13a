"""Settings of the whole suite: how long Hypothesis searches, one seed for each test, one thread for each worker."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed",
    deadline=None,
    max_examples=60,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False, max_examples=600)
settings.load_profile("fixed")  # `pytest --hypothesis-profile=random` searches longer, from another seed each time

if not torch.cuda.is_available():  # a GPU runs the Triton kernels as they are
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # two OpenMP pools on one core spend their time waiting for each other
    torch.set_num_threads(1)


# Minutes of compilation and of Triton's interpreter, and programs of their own.
LONGEST = ("test_compilation", "test_interpreted", "test_skipping", "test_symbols", "test_examples")
LONGEST_ON_A_GPU = ("test_any_call", "test_twenty_runs_give_the_same_bits")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run every case of tests that are marked so")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "thorough(one_in): without --thorough, one in so many of the test's cases is run, or none"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked for; start with the tests that take longest, so that none of them runs alone at the
    end, beside an idle worker.
    """
    if not config.getoption("thorough"):
        named = [argument[argument.index("::") :] for argument in config.args if "::" in argument]
        left_out = {x for x in _for_thorough_runs(items) if not any(name in x.nodeid for name in named)}
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def is_short(item: pytest.Item) -> bool:
        if item.path.parent.name == "cuda":
            return item.name.partition("[")[0] not in LONGEST_ON_A_GPU
        return item.path.stem not in LONGEST

    items.sort(key=is_short)


def _for_thorough_runs(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    cases: Counter[str] = Counter()  # of each test, so far
    for item in items:
        mark = item.get_closest_marker("thorough")
        if mark is not None:
            test, one_in = item.nodeid.partition("[")[0], mark.kwargs.get("one_in")
            if one_in is None or cases[test] % one_in:
                yield item
            cases[test] += 1


def pytest_collection_finish() -> None:
    """Spare the garbage collector the walk over some ten thousand tests, which stay anyway."""
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Give every test one seed and no call that came before, so that it does not depend on the tests before it."""
    torch.manual_seed(0)
    if (plans := sys.modules.get("fused_mha.core.plans")) is not None:
        plans.forget()


@pytest.fixture
def one_calls(monkeypatch):
    """A list that gets True for each forward that one call of the library serves, and False for each other.

    Products are ours in every dtype, whatever this processor's rule.
    """
    from fused_mha.backends import cpu
    from fused_mha.module import linear, one_call

    if cpu.LIBRARY is None:
        pytest.skip("this installation has no C++ library")
    served = []
    forward, serve = one_call.forward, one_call.Small.serve

    def spy(*arguments, **options):
        result = forward(*arguments, **options)
        served.append(result is not None)
        return result

    def spy_on_small(call):
        result = serve(call)
        if result is not None:  # else `forward` comes next
            served.append(True)
        return result

    monkeypatch.setattr(linear, "dtypes", lambda: (torch.float32, torch.float64, torch.bfloat16, torch.float16))
    monkeypatch.setattr(one_call, "forward", spy)
    monkeypatch.setattr(one_call.Small, "serve", spy_on_small)
    return served


@pytest.fixture
def fresh_compiler():
    """`torch.compile` knows no graph of another test, and keeps none of this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def module():
    """A module for the tests of which back end serves a call; `x` is its input."""
    import fused_mha

    return fused_mha.MultiHeadAttention(16, 4, batch_first=True)


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def without_the_library(monkeypatch):
    """The back ends of an installation that found no C++ compiler."""
    from fused_mha.backends import cpu
    from fused_mha.core import dispatch

    missing = cpu.BACKEND._replace(capability=cpu.BACKEND.capability._replace(is_installed=False))
    monkeypatch.setattr(dispatch, "BACKENDS", (missing, *dispatch.BACKENDS[1:]))


@pytest.fixture
def served_by(monkeypatch):
    """The names of the back ends that have served, in order of the calls."""
    from fused_mha.core import dispatch

    names = []

    def spy(candidate):
        def run(inputs):
            names.append(candidate.name)
            return candidate.run(inputs)

        return candidate._replace(run=run)

    monkeypatch.setattr(dispatch, "BACKENDS", tuple(spy(candidate) for candidate in dispatch.BACKENDS))
    return names

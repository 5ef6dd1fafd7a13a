"""Contenders in processes of their own, in many short turns in random order: `peers` measures by this.

In one process the idle threads of one runtime slow the next, and a machine that is slow for seconds is slow for one of
them alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import TypeVar

import torch

from fused_mha.benchmark.harness import Contender, median_ms

TURNS_PER_SECOND, LEAST_TURNS = 20, 3
TURN = 0.02  # seconds, after the calls that warm up
PAUSE = 0.05  # seconds, in which idle threads of the other runtime stop spinning
Make = Callable[[], Contender]  # it is pickled and runs in the contender's process
Result = TypeVar("Result")

_calls: list[Contender] = []  # of this process, if it is a contender's; one at a time


class ContenderError(RuntimeError):
    """A contender that failed while it was timed; ``name`` says which."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(str(error))
        self.name = name


class Processes(contextlib.ExitStack):
    """A process for each contender, from its first call to the end of a `with` block."""

    def __init__(self, threads: int) -> None:
        """Each process may use ``threads`` threads."""
        super().__init__()
        self._threads = threads
        self._pools: dict[str, ProcessPoolExecutor] = {}
        self._random = random.Random(0)

    def make(self, name: str, make: Make) -> None:
        """Give a contender its next call; raises AssertionError or RuntimeError, as ``make`` did in its process."""
        self._result(name, _make, make)

    def turns(self, names: Sequence[str], seconds: float) -> list[dict[str, float]]:
        """Milliseconds a call, of every contender in every turn; each contender is timed for about ``seconds``.

        Raises `ContenderError` for the first contender that fails.
        """
        turns = []
        for _ in range(max(LEAST_TURNS, round(seconds * TURNS_PER_SECOND))):
            turn = {}
            for name in self._random.sample(names, len(names)):
                time.sleep(PAUSE)
                try:
                    turn[name] = self._result(name, _time)
                except (AssertionError, RuntimeError) as error:
                    raise ContenderError(name, error) from None
            turns.append(turn)
        return turns

    def _result(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        if name not in self._pools:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(self._threads,))
            self._pools[name] = self.enter_context(pool)
        try:
            return self._pools[name].submit(function, *arguments).result()
        except BrokenExecutor:
            del self._pools[name]  # the next call has a new process
            raise RuntimeError("its process ended") from None


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of the process that waits
    torch.set_num_threads(threads)


def _make(make: Make) -> None:
    _calls.clear()
    with _picklable_errors():
        _calls.append(make())


def _time() -> float:
    with _picklable_errors():
        return median_ms(_calls[0], TURN, min_rounds=1)


@contextlib.contextmanager
def _picklable_errors() -> Iterator[None]:
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:  # of a type of the runtime's, which the other process may be unable to unpickle
        raise RuntimeError(f"{type(error).__name__}: {error}") from None

"""Cases that compute nothing, the command on them, peers that are none, and what another process can import."""

import contextlib
import os

import pytest
import torch

from fused_mha.benchmark import command
from fused_mha.benchmark.harness import BenchCase
from fused_mha.benchmark.module_cells import modules
from fused_mha.benchmark.peers import Peer

SHAPE = ["--shape", "1,3,8,2"]
SHORT = ["--seconds", "0.001"]


def nothing():
    """A contender, or a check that finds nothing."""


def case(name="a", verify=nothing, ours=nothing):
    return BenchCase("group", name, ours, {"torch": nothing}, 0.95, verify)


def run(*options):
    return command.main([*options, *SHORT])


def refused(capsys, *options):
    with pytest.raises(SystemExit) as raised:
        command.main([str(option) for option in options])
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    usage, sentence = err.strip().rsplit("\n", 1)
    assert usage.startswith("usage: python -m fused_mha.benchmark")
    return sentence.removeprefix("python -m fused_mha.benchmark: error: ")


class InThisProcess(contextlib.nullcontext):
    """`Processes` without processes, whose clock says what each contender is to take."""

    def __init__(self, milliseconds):
        super().__init__(self)
        self.milliseconds = milliseconds
        self.made = {}

    def make(self, name, make):
        self.made[name] = make()

    def turns(self, names, seconds):
        """Three; the machine is twice as slow in the last."""
        return [{name: self.milliseconds[name] * slow for name in names} for slow in (1.0, 1.0, 2.0)]


def peer(runs, refusal=None, packages=("torch", "numpy")):
    return Peer(packages, lambda call: refusal, runs)


def torchs(call):
    """The runs of a peer that is right: torch's own module."""
    return [call.of(modules(*call).theirs)]


def wrong(call):
    (run,) = torchs(call)
    return [run, lambda: tuple(1.01 * x for x in run())]


class RuntimesOwnError(Exception):
    """An error that another process cannot unpickle."""

    def __init__(self, what, code):
        super().__init__(f"{what}, code {code}")


def of_one_thread():
    assert torch.get_num_threads() == 1, "it has the wrong threads"
    return nothing


def wrong_at_once():
    raise AssertionError("it is off")


def failing():
    raise RuntimesOwnError("no such node", 7)


def failing_in_the_first_call():
    return failing


def dying():
    os._exit(1)

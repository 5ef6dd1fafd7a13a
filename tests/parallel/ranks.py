"""Processes that are the ranks of one gloo group, kept over many tests: `conftest` starts them, tests run functions.

A server that has imported torch once forks them. A test's function is found again in them by its file and name, and
what it returns comes back by pickle. Whatever it raises is raised in the test.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

PATIENCE = 60  # seconds, for which a rank waits for another, and a test for all: longer is a hang
PRELOADED = ["fused_mha.parallel", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "pytest"]


class RankError(Exception):
    """What a rank raised that should not have."""


class Ranks:
    """Some processes of one group."""

    def __init__(self, size):
        self.size = size
        self._processes = []
        self._pipes = []

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder = tempfile.mkdtemp()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, f"{folder}/store"), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self):
        """End the processes; the next call starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def outcomes(self, function, *arguments):
        """What each rank returned or raised, with the text of the traceback or None."""
        if not self._processes:
            self._start()
        call = pickle.dumps((function.__code__.co_filename, function.__name__, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                self.stop()
                raise RankError(f"rank {rank} of {self.size} hangs in {function.__name__}{arguments}")
            outcomes.append(pickle.loads(pipe.recv_bytes()))
        return outcomes

    def run(self, function, *arguments):
        """Call a function of a test file in every rank.

        Args:
            function: of the top level of its file.
            *arguments: what pickle takes.

        Returns:
            What each rank returned, in their order.
        """
        outcomes = self.outcomes(function, *arguments)
        if failures := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]:
            self.stop()  # they may wait for each other
            raise RankError("\n".join(failures))
        return [result for result, _ in outcomes]

    def errors(self, function, *arguments):
        """The exception that each rank raised, as (type's name, text); None for a rank that raised none."""
        return [
            None if text is None else (type(error).__name__, str(error))
            for error, text in self.outcomes(function, *arguments)
        ]


def _serve(pipe, rank, size, store):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if Path("/sys/class/net/lo").exists() else ""
    with contextlib.suppress(EOFError):
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE / 2)
        )
        files = {}
        while True:
            path, name, arguments = pickle.loads(pipe.recv_bytes())
            try:
                if path not in files:
                    files[path] = _load(path)
                torch.manual_seed(0)
                outcome = getattr(files[path], name)(*arguments), None
            except Exception as error:
                outcome = error, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(outcome))


def _load(path):
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

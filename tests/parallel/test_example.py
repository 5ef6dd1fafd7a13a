"""The example of distributed training, in ranks that run already, and without any."""

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

EXAMPLES = str(Path(__file__).parents[2] / "examples")
TINY = ["--steps", "3", "--batch-size", "2", "--context", "16", "--layers", "1", "--embed-dim", "8", "--heads", "2"]


def load():
    if EXAMPLES not in sys.path:
        sys.path.insert(0, EXAMPLES)
    import distributed_training

    return distributed_training


def train(is_wrong):
    """The exit status, and what is printed."""
    example = load()
    printed = io.StringIO()
    world = {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, world))
        stack.enter_context(contextlib.redirect_stdout(printed))
        if is_wrong:  # each rank attends to its own part alone
            stack.enter_context(mock.patch.object(example, "context_parallel", lambda model, mesh: model))
        return example.main([*TINY, "--characters", "20000"]), printed.getvalue()


def test_four_ways_have_the_losses_of_one_process(two_ranks):
    (status, printed), (other, nothing) = two_ranks.run(train, False)
    assert status == other == 0
    assert nothing == ""
    assert "one process           DDP         FSDP2         heads          ring" in printed
    rows = [line.split() for line in printed.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(len({round(float(loss), 4) for loss in row[1:]}) == 1 for row in rows)
    assert "they agree" in printed


def test_a_way_that_is_wrong_is_noticed(two_ranks):
    for status, printed in two_ranks.run(train, True):
        assert status == 1
        assert not printed or "THEY DIFFER" in printed


@pytest.mark.parametrize(
    ("arguments", "world", "message"),
    [
        ("", {}, "start this by torchrun"),
        ("--heads 3 --embed-dim 12", {"WORLD_SIZE": "2"}, "--heads must be a multiple of 2 for 2 processes; got 3"),
        ("--context 6", {"WORLD_SIZE": "2"}, "--context must be a multiple of 4 for 2 processes; got 6"),
    ],
)
def test_bad_options_are_refused_with_the_reason(monkeypatch, capsys, arguments, world, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        load().main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

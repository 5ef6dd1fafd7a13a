"""A contender in a process of its own: its threads, its errors, its end."""

import pytest

from benchmark.fakes import dying, failing, failing_in_the_first_call, of_one_thread, wrong_at_once
from fused_mha.benchmark import processes
from fused_mha.benchmark.processes import LEAST_TURNS, ContenderError, Processes


def test_a_contender_fails_and_dies_alone_and_is_timed_in_turns(monkeypatch):
    monkeypatch.setattr(processes, "PAUSE", 0.0)
    with Processes(1) as contenders:
        with pytest.raises(AssertionError, match=r"^it is off$"):
            contenders.make("a", wrong_at_once)
        with pytest.raises(RuntimeError, match=r"^RuntimesOwnError: no such node, code 7$"):
            contenders.make("a", failing)
        with pytest.raises(RuntimeError, match=r"^its process ended$"):
            contenders.make("a", dying)
        contenders.make("a", of_one_thread)
        turns = contenders.turns(["a"], 0.0)
        contenders.make("b", failing_in_the_first_call)
        with pytest.raises(ContenderError, match=r"^RuntimesOwnError: no such node, code 7$") as failed:
            contenders.turns(["a", "b"], 0.0)
        assert failed.value.name == "b"
    assert len(turns) == LEAST_TURNS
    assert all(turn["a"] > 0.0 for turn in turns)


def test_the_order_of_the_contenders_changes_from_turn_to_turn_and_not_from_run_to_run(monkeypatch):
    monkeypatch.setattr(processes, "PAUSE", 0.0)
    orders = []
    for _ in range(2):
        asked = []
        contenders = Processes(1)
        monkeypatch.setattr(contenders, "_result", lambda name, function, asked=asked: asked.append(name) or 1.0)
        assert contenders.turns(["a", "b", "c"], 0.5) == [{"a": 1.0, "b": 1.0, "c": 1.0}] * 10
        orders.append([tuple(asked[place : place + 3]) for place in range(0, 30, 3)])
    assert orders[0] == orders[1]
    assert len(set(orders[0])) > 2

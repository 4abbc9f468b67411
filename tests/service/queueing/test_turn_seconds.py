"""A turn goes on with an owner's next slices while they are short, and never beyond its time by more than one slice."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.service.queueing.turns import Task, Turns

QUANTUM = 1.0


def task(owner: str) -> Task:
    return Task(owner, "queue", None, "request", "kind", lambda: {})


def run(turns: Turns, slices: dict[str, list[float]]) -> list[tuple[str, float]]:
    """Give each owner a task for each of these slices; return owner and seconds of the slices in the order they are run."""
    left = {owner: list(seconds) for owner, seconds in slices.items()}
    for owner, seconds in slices.items():
        for _ in seconds:
            turns.add(task(owner))
    ran = []
    while (taken := turns.take()) is not None:
        ran.append((taken.owner, left[taken.owner].pop(0)))
        turns.give_back(False, ran[-1][1])
    return ran


SECONDS = st.sampled_from([0.0, 0.01, 0.1, 0.4, 0.9, 1.0, 7.0])


@given(slices=st.dictionaries(st.sampled_from("abc"), st.lists(SECONDS, min_size=1, max_size=12), min_size=1))
def test_turns_end_in_time(slices: dict[str, list[float]]) -> None:
    """Every slice runs once, in its owner's order; while others wait, a turn has no slice that begins after its time."""
    ran = run(Turns(QUANTUM), slices)
    assert {owner: [s for o, s in ran if o == owner] for owner in slices} == slices
    waiting = {owner: len(seconds) for owner, seconds in slices.items()}
    for owner, turn in groupby(ran, lambda one: one[0]):
        seconds = [s for _, s in turn]
        waiting[owner] -= len(seconds)
        if any(count for other, count in waiting.items() if other != owner):
            assert sum(seconds[:-1]) < QUANTUM
            assert not waiting[owner] or sum(seconds) >= QUANTUM  # it did not give way before its time


@pytest.mark.parametrize(("seconds", "before"), [(QUANTUM, 20), (0.0, 1)])
def test_short_slices_do_not_wait_for_long_ones(seconds: float, before: int) -> None:
    """Twenty short slices run before the second long one of another owner; without time for a turn, one of them does."""
    ran = [owner for owner, _ in run(Turns(seconds), {"long": [5.0] * 20, "short": [0.01] * 20})]
    second = [i for i, owner in enumerate(ran) if owner == "long"][1]
    assert ran[:second].count("short") == before


def test_an_owner_who_comes_back_has_a_whole_turn() -> None:
    """What an owner took in an earlier turn does not count, also where another's task was taken out meanwhile."""
    turns, gone = Turns(QUANTUM), task("b")
    for one in (task("a"), task("a"), gone):
        turns.add(one)
    for _ in range(2):
        first = turns.take()
        assert first is not None
        assert first.owner == "a"
        turns.give_back(False, 0.4)
    turns.remove(gone)
    for owner in "ccd":
        turns.add(task(owner))
    ran = []
    while (taken := turns.take()) is not None:
        ran.append(taken.owner)
        turns.give_back(False, 0.7)
    assert ran == ["c", "c", "d"]

"""What a backend knows of its accumulation: calls that were added, and failures that nobody has seen."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from helpers import make_data
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends.calls.prepared import prepare
from pullback.backends.engine import Gradient
from pullback.backends.operations.accumulation import Accumulation, unretrieved
from pullback.backends.operations.futures import Failure, State
from pullback.backends.types import ForwardBackwardOutput
from pullback.errors import PrecedingOperationFailed
from pullback.losses import GRPO, CrossEntropy


@dataclass
class Succeeded:
    """An operation that has ended well, once it has been waited for."""

    retrieved: bool = False
    deadline: float | None = 7.0
    waited: float | None = None
    state: State = "accepted"

    def settle(self, timeout: float | None = None) -> None:
        self.waited = timeout


def failures(seen: list[bool]) -> list[Failure]:
    return [Failure(KeyError(f"number {i}"), retrieved) for i, retrieved in enumerate(seen)]


@given(seen=st.lists(st.booleans(), max_size=4))
def test_the_first_failure_that_nobody_saw_is_told(seen: list[bool]) -> None:
    """A step, or a checkpoint, waits for every operation before it."""
    fine = Succeeded()
    accumulation = Accumulation(outcomes=[fine, *failures(seen)])
    first = seen.index(False) if False in seen else None
    if first is None:
        accumulation.require_complete()
    else:
        with pytest.raises(PrecedingOperationFailed, match=f"number {first}"):
            accumulation.require_complete()
    assert fine.waited == 7.0
    accumulation.retrieve_failures()
    accumulation.require_complete()
    assert all(outcome.retrieved for outcome in accumulation.outcomes)


def test_failures_at_the_end() -> None:
    """Closing names the first of them and how many there are."""
    errors = [KeyError("one"), ValueError("two")]
    assert "2 operation(s) failed" in str(unretrieved(errors))
    assert "the first: KeyError: 'one'" in str(unretrieved(errors))


def test_calls_are_entered_with_what_they_wait_for() -> None:
    """A mean is remembered as the one that waits, a sum or a loss that was divided is not; a new accumulation knows neither."""
    data, output = make_data([3, 2]), ForwardBackwardOutput([], {})
    accumulation = Accumulation()
    accumulation.record(prepare(data, CrossEntropy()), Gradient(output, 5, 2, "none", 1.0))
    assert accumulation.ledger.deferred == ""
    mean = prepare(data, GRPO(aggregation="group_mean_token_mean"), counts={"groups": 4.0})
    accumulation.record(mean, Gradient(output, 4, 1, "groups", 3.0))
    ledger = accumulation.ledger
    assert ledger.deferred == mean.described
    assert [(e.loss, e.datums, e.tokens, e.sequences, e.denominator, e.count) for e in ledger.entries] == [
        ("cross_entropy", 2, 5, 2, "none", 1.0),
        ("grpo", 2, 4, 1, "groups", 3.0),
    ]
    assert ledger.counts == {("grpo", "groups"): 4.0}
    assert ledger.groups == {("grpo", group) for group in mean.groups}
    accumulation.outcomes = list(failures([False]))
    accumulation.clear()
    assert (accumulation.outcomes, accumulation.ledger.entries, accumulation.ledger.operations) == ([], [], 2)

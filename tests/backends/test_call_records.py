"""The records of calls: what has failed elsewhere is in no total, and refuses nothing, once that has been learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends.operations.accumulation import Accumulation
from pullback.backends.operations.call_record import CallRecord
from pullback.backends.operations.futures import Failure, State
from pullback.backends.operations.normalization import Ledger
from pullback.backends.protocol import NormalizationMode
from pullback.errors import PullbackError

MODES: tuple[NormalizationMode, ...] = (None, "num_loss_tokens", "num_sequences", "auto", 3.0)
LOSSES = ("a", "b")


@dataclass
class Elsewhere:
    """A call that is under way until somebody learns how it has ended."""

    ends: State
    state: State = "pending"
    retrieved: bool = False
    deadline: float | None = None

    def settle(self, timeout: float | None = None) -> BaseException | None:
        self.state = self.ends
        return None if self.ends == "accepted" else KeyError(self.ends)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """What is said of a call whose loss is a sum, a mean, or a mean that ``counts`` divide."""
    loss, mean, given = draw(st.sampled_from(LOSSES)), draw(st.booleans()), draw(st.booleans())
    return {
        "loss": loss,
        "datums": 1,
        "tokens": draw(st.integers(0, 5)),
        "sequences": 1,
        "denominator": "tokens" if mean and not given else "none",
        "count": draw(st.floats(0.5, 9.0)),
        "declared": None if mean else "num_loss_tokens",
        "described": f"{loss}({draw(st.integers(0, 1))})",
        "counts": {"tokens": draw(st.sampled_from([8.0, 9.0]))} if mean and given else {},
        "groups": frozenset(draw(st.sets(st.integers(0, 3), max_size=2))),
        "mean": mean and not given,
    }


def told(work: Callable[[], Any]) -> Any:
    """What a call returns, or how it refuses."""
    try:
        return work()
    except PullbackError as error:
        return type(error), str(error)


def totals(ledger: Ledger) -> list[Any]:
    """All that is derived from the records, except the numbers of operations."""
    joins = [(name, by, f"{name}(0)") for name in LOSSES for by in ("none", "tokens")]
    return [
        [(e.loss, e.tokens, e.count, e.denominator) for e in ledger.entries],
        *(ledger.declared, ledger.counts, ledger.groups, ledger.deferred, ledger.denominator, ledger.tokens),
        *(told(partial(ledger.divisor, mode)) for mode in MODES),
        *(told(partial(ledger.admit, *join)) for join in joins),
        *(told(partial(ledger.admit_units, name, {"tokens": 8.0}, range(4))) for name in LOSSES),
    ]


def filled(calls: list[tuple[dict[str, Any], State | None]], without: tuple[State, ...] = ()) -> Ledger:
    accumulation = Accumulation()
    for said, ends in calls:
        if ends in without:
            continue
        accumulation.ledger.record(**said)
        if ends is not None:
            accumulation.follow(Elsewhere(ends))
    return accumulation.ledger


CALLS = st.lists(st.tuples(records(), st.sampled_from([None, "accepted", "failed", "unknown"])), max_size=5)


@given(calls=CALLS)
def test_failed_calls_count_until_they_are_known(calls: list[tuple[dict[str, Any], State | None]]) -> None:
    """While they are pending all calls count; then those that did not fail: the same totals, divisors and refusals."""
    ledger, all_of_them, rest = filled(calls), filled([(said, None) for said, _ in calls]), filled(calls, ("failed",))
    assert totals(ledger) == totals(all_of_them)
    for call in ledger.calls:
        assert call.error is None
        if call.outcome is not None:
            call.outcome.settle()
    assert totals(ledger) == totals(rest)
    assert ledger.operations == len(calls)
    doubtful = [ends for _, ends in calls if ends in ("failed", "unknown")]
    assert [str(call.error) for call in ledger.calls if call.error is not None] == [repr(ends) for ends in doubtful]


def test_totals_that_keep_what_failed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    said: dict[str, Any] = {
        "loss": "a",
        "datums": 1,
        "tokens": 3,
        "sequences": 1,
        "denominator": "tokens",
        "count": 3.0,
    }
    said |= {"declared": None, "described": "a(0)", "counts": {}, "groups": frozenset(), "mean": True}
    of_one_call: Callable[..., None] = test_failed_calls_count_until_they_are_known.hypothesis.inner_test  # type: ignore[attr-defined]
    of_one_call(calls=[(said, "failed")])
    monkeypatch.setattr(CallRecord, "state", property(lambda self: "accepted"))
    with pytest.raises(AssertionError):
        of_one_call(calls=[(said, "failed")])


def test_what_fails_here_adds_nothing() -> None:
    """Such a call is entered nowhere; its failure says so."""
    assert Failure(KeyError()).state == "failed"

"""The ledger: an accumulation is divided by a sum over its calls; what no one number can divide is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends.operations.normalization import Ledger
from pullback.backends.types import LedgerEntry
from pullback.errors import (
    ConfigError,
    DoubleNormalizationError,
    EmptyUnitError,
    IncompleteUnitError,
    MixedDenominatorsError,
)

CALLS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.floats(0.5, 50)), min_size=1, max_size=4)


def ledger(
    calls: list[tuple[int, int, float]], declared: str | None = None, denominator: str = "none", **said: Any
) -> Ledger:
    """A ledger of calls, each with its tokens, sequences and count."""
    made = Ledger()
    for tokens, sequences, count in calls:
        counted: dict[str, Any] = {"tokens": tokens, "sequences": sequences, "denominator": denominator, "count": count}
        made.record(**{"loss": "some", "datums": 2, "declared": declared, **counted, **said})
    return made


@given(calls=CALLS)
def test_totals_are_sums_over_the_calls(calls: list[tuple[int, int, float]]) -> None:
    """Tokens, sequences and counts, not those of the first or the last call; and the reason says of what."""
    tokens, sequences, counts = (sum(column) for column in zip(*calls, strict=True))
    raw, mean = ledger(calls, "num_loss_tokens"), ledger(calls, None, "tokens")
    words = f"over {len(calls)} call{'s' if len(calls) > 1 else ''}"
    assert (raw.tokens, raw.sequences) == (tokens, sequences)
    found = [raw.divisor("num_loss_tokens"), raw.divisor("num_sequences"), mean.divisor(None)]
    assert [d.value for d in found] == pytest.approx([tokens, sequences, counts], rel=1e-15)
    assert [d.reason for d in found] == [f"num_loss_tokens {words}", f"num_sequences {words}", f"tokens {words}"]
    assert raw.divisor("auto") == raw.divisor("num_loss_tokens")
    assert mean.divisor("auto") == mean.divisor(None)
    assert (raw.divisor(None).value, raw.divisor(None).reason) == (1.0, "nothing")
    assert [entry.operation for entry in raw.entries] == list(range(1, len(calls) + 1))


def test_an_empty_ledger_divides_by_nothing() -> None:
    """And waits for no denominator; the operations go on to be numbered."""
    empty = ledger([(1, 1, 1.0), (2, 1, 1.0)]).emptied()
    assert empty.denominator is None
    assert (empty.divisor(None).value, empty.divisor("auto").value) == (1.0, 1.0)
    assert (empty.tokens, empty.sequences, empty.operations) == (0, 0, 2)
    assert empty.divisor("num_sequences").reason == "num_sequences over 0 calls"


def test_one_division_only() -> None:
    """A normalising mode on top of a mean is refused, also where only the last of several calls is one."""
    mixed = ledger([(3, 1, 1.0)], "num_loss_tokens")
    mixed.record(loss="mean", datums=1, declared=None, tokens=1, sequences=1, denominator="none", count=1.0)
    for mode in ("num_loss_tokens", "num_sequences"):
        with pytest.raises(DoubleNormalizationError, match="mean is already a mean"):
            mixed.divisor(mode)
    with pytest.raises(ConfigError, match="different normalisations"):
        mixed.divisor("auto")
    with pytest.raises(ConfigError, match="must be None, 'auto'"):
        mixed.divisor("tokens")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a function does not say"):
        ledger([(3, 1, 1.0)], "function").resolve("auto")


def test_a_weighted_mean_of_nothing_positive() -> None:
    """Weights that sum to 0 or less over trained tokens have no mean; with no gradient at all there is nothing to refuse."""
    for total in (0.0, -1.5):
        with pytest.raises(EmptyUnitError, match="positive"):
            ledger([(2, 1, 1.0), (2, 1, total - 1.0)], None, "weight_sum").divisor(None)
    assert ledger([(2, 1, 1.0), (2, 1, -0.5)], None, "weight_sum").divisor(None).value == 0.5
    assert ledger([(0, 0, 0.0)], None, "weight_sum").divisor(None).value == 0.0
    assert ledger([(2, 1, 0.0)], None, "tokens").divisor(None).value == 0.0


def test_what_can_join() -> None:
    """One denominator, and one loss where it is divided; sums of any losses; whatever comes first."""
    empty, raw, mean = Ledger(), ledger([(1, 1, 1.0)]), ledger([(1, 1, 1.0)], None, "tokens", described="a(1)")
    empty.admit("any", "tokens", "any()")
    raw.admit("other", "none", "other()")
    mean.admit("a", "tokens", "a(1)")
    mean.admit("a", "tokens")
    raw.admit("b", "none", "b()")
    for other in ("a(0)", "a(2)"):
        with pytest.raises(MixedDenominatorsError, match="two means of one step"):
            mean.admit("a", "tokens", other)
    with pytest.raises(MixedDenominatorsError, match=r"divided by nothing, but .* number of tokens"):
        mean.admit("b", "none", "b()")
    with pytest.raises(MixedDenominatorsError, match=r"number of pairs, but .* divided by nothing"):
        raw.admit("b", "pairs", "b()")


@given(calls=CALLS, empties=st.integers(1, 3), first=st.booleans())
def test_sums_without_a_gradient_are_no_part_of_a_mean(
    calls: list[tuple[int, int, float]], empties: int, first: bool
) -> None:
    """Such as what a service keeps of a loss that failed at its client: neither refused, nor counted; with one, refused."""
    mean, nothing = ledger(calls, None, "tokens"), ledger([(0, 0, 1.0)] * empties, "num_loss_tokens")
    both = [nothing, mean] if first else [mean, nothing]
    mixed = Ledger([call for part in both for call in part.calls])
    assert nothing.denominator is None
    nothing.admit("mean", "tokens")
    assert mixed.divisor(None) == mean.divisor(None)
    nothing.record(loss="sum", datums=1, declared=None, tokens=1, sequences=1, denominator="none", count=1.0)
    with pytest.raises(MixedDenominatorsError, match=r"divided by nothing \(from sum\)"):
        nothing.admit("mean", "tokens")


def test_units_of_a_step() -> None:
    """One total and whole groups for a loss; another loss, another denominator and another group are free."""
    first = ledger([(1, 1, 1.0)], loss="a", counts={"tokens": 8.0}, groups=frozenset({1}))
    made = Ledger(first.calls + ledger([(1, 1, 1.0)], loss="b", groups=frozenset({2})).calls)
    made.admit_units("a", {"tokens": 8.0, "pairs": 3.0}, [2, 3])
    made.admit_units("b", {"tokens": 9.0}, [1])
    with pytest.raises(ConfigError, match="has 9 tokens, an earlier call said 8"):
        made.admit_units("a", {"tokens": 9.0}, [])
    with pytest.raises(IncompleteUnitError, match=r"groups \[1\]"):
        made.admit_units("a", {}, [3, 1])


@given(calls=CALLS, declared=st.sampled_from([None, "num_loss_tokens", "function"]))
def test_a_checkpoint_has_everything(calls: list[tuple[int, int, float]], declared: str | None) -> None:
    """What is written as JSON is read again as it was."""
    made = ledger(calls, declared, "tokens", loss="a", described="a()", counts={"tokens": 8.0}, groups=frozenset({3}))
    made.calls += ledger([(1, 1, 1.0)], declared, loss="b", counts={"pairs": 2.0}, groups=frozenset({1})).calls
    read = Ledger.from_json(json.loads(json.dumps(made.to_json())), made.operations)
    assert read == made
    assert (read.counts, read.deferred) == ({("a", "tokens"): 8.0, ("b", "pairs"): 2.0}, "a()")
    assert read.groups == {("a", 3), ("b", 1)}
    bare = Ledger.from_json({key: value for key, value in made.to_json().items() if key in ("ledger", "fitting")})
    assert (bare.entries, bare.declared, bare.operations) == (made.entries, made.declared, 0)
    assert (bare.counts, bare.groups, bare.deferred) == ({}, set(), "")
    assert isinstance(bare.entries[0], LedgerEntry)

"""Hypothesis strategies for losses. They need the extra ``test``; nothing else imports this module."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from .cases import Case, CaseSequence

__all__ = ["cases", "sequences"]

_JUNK = (math.nan, math.inf, -math.inf, 7.0)


@st.composite
def sequences(
    draw: st.DrawFn, *, low: float = -6.0, high: float = -0.05, junk: bool = True, empty: bool = False
) -> CaseSequence:
    """Draw one sequence of 1 to 5 tokens, with NaN, inf and arbitrary numbers at its untrained positions.

    Args:
        low, high: smallest and largest log-prob.
        junk: fill untrained positions with values that must have no effect.
        empty: allow a sequence without a trained token.
    """
    length = draw(st.integers(1, 5))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.5, 2.0]), min_size=length, max_size=length))
    if not empty and not any(weights):
        weights[draw(st.integers(0, length - 1))] = 1.0

    def numbers(smallest: float, largest: float) -> list[float]:
        values = draw(st.lists(st.floats(smallest, largest), min_size=length, max_size=length))
        if junk:
            return [x if w else draw(st.sampled_from(_JUNK)) for x, w in zip(values, weights, strict=True)]
        return values

    return CaseSequence(
        logprobs=numbers(low, high),
        weights=weights,
        advantages=numbers(-2.0, 2.0),
        rollout_logprobs=numbers(low, high),
        old_logprobs=numbers(low, high),
        ref_logprobs=numbers(low, high),
        group=draw(st.integers(0, 2)),
    )


@st.composite
def cases(draw: st.DrawFn, *, low: float = -6.0, high: float = -0.05, junk: bool = True, empty: bool = False) -> Case:
    """Draw two, four or six sequences, of which neighbours are pairs; see `sequences`."""
    pairs = draw(st.integers(1, 3))
    sequence = sequences(low=low, high=high, junk=junk, empty=empty)
    drawn = draw(st.lists(sequence, min_size=2 * pairs, max_size=2 * pairs))
    return Case(tuple(drawn), with_old=draw(st.booleans()))

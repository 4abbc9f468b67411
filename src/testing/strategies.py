"""hypothesis strategies for losses (needs the extra ``test``). Import this module by name; nothing else imports it."""

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
    """One sequence of 1 to 5 tokens, with NaN, inf and nonsense in its untrained positions.

    Args:
        low, high: smallest and largest log-prob.
        junk: put nonsense where nothing is trained.
        empty: allow a sequence without a trained token.
    """
    length = draw(st.integers(1, 5))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.5, 2.0]), min_size=length, max_size=length))
    if not empty and not any(weights):
        weights[draw(st.integers(0, length - 1))] = 1.0

    def numbers(smallest: float, largest: float) -> list[float]:
        drawn = draw(st.lists(st.floats(smallest, largest), min_size=length, max_size=length))
        if junk:
            return [x if w else draw(st.sampled_from(_JUNK)) for x, w in zip(drawn, weights, strict=True)]
        return drawn

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
    """Two to six sequences, an even number (neighbours are pairs); see `sequences`."""
    pairs = draw(st.integers(1, 3))
    one = sequences(low=low, high=high, junk=junk, empty=empty)
    drawn = draw(st.lists(one, min_size=2 * pairs, max_size=2 * pairs))
    return Case(tuple(drawn), with_old=draw(st.booleans()))

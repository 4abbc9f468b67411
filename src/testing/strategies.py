"""Hypothesis strategies for losses. They need the extra ``test``; nothing else imports this module."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from .cases import Case, CaseSequence

__all__ = ["cases", "readable_cases", "sequences"]

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


@st.composite
def readable_cases(draw: st.DrawFn, *, unit: int = 1, on_policy: bool = False) -> Case:
    """Draw up to four sequences of up to three tokens, in sixteenths: exact in half precision, and readable once shrunk.

    Args:
        unit: sequences that belong together; each sequence of a pair has a trained token.
        on_policy: the policy is its own anchor and sampler.
    """
    count = unit * draw(st.integers(1, 4 // unit))
    return Case(tuple(draw(_readable(on_policy)) for _ in range(count)), with_old=draw(st.booleans()))


@st.composite
def _readable(draw: st.DrawFn, on_policy: bool) -> CaseSequence:
    length = draw(st.integers(1, 3))

    def numbers(low: int, high: int) -> list[float]:
        return [draw(st.integers(low, high)) / 16 for _ in range(length)]

    weights = [draw(st.sampled_from((1.0, 0.0, 0.5, 2.0))) for _ in range(length)]
    if not any(weights):
        weights[draw(st.integers(0, length - 1))] = 1.0
    policy = [x - 1 for x in numbers(-32, 8)]

    def anchor() -> list[float]:
        return policy if on_policy else [x + d for x, d in zip(policy, numbers(-8, 7), strict=True)]

    reference = [x + d for x, d in zip(policy, numbers(-16, 7), strict=True)]
    advantages = [1 + x if x >= 0 else x - 1 for x in numbers(-16, 16)]
    return CaseSequence(policy, weights, advantages, anchor(), anchor(), reference, draw(st.integers(0, 1)))

"""Clip ranges: what an epsilon means, which bounds are refused, and on which side an edge lies."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import ConfigError
from pullback.losses import PPO, ClipRange
from pullback.losses.parts.clip import check_dual_clip


@given(low=st.floats(0, 1), high=st.floats(0, 9) | st.just(math.inf))
def test_epsilons_and_logs(low: float, high: float) -> None:
    """Distances from 1, or from 0 in the logarithm; one epsilon is for both sides, and infinity is no bound."""
    assert ClipRange.from_epsilon(low, high) == ClipRange(1 - low, 1 + high)
    assert ClipRange.from_epsilon(low) == ClipRange.of(low) == ClipRange(1 - low, 1 + low)
    assert ClipRange.from_log(low, low) == ClipRange(math.exp(-low), math.exp(low))
    assert ClipRange.of(ClipRange(1 - low, 1 + high)) == ClipRange(1 - low, 1 + high)
    with pytest.warns(DeprecationWarning, match="from_epsilon") as caught:
        assert ClipRange.from_offsets(low, high) == ClipRange.from_epsilon(low, high)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("wrong", [True, False, "0.2", None, [0.2], math.nan, -0.1, 1.5])
def test_what_is_no_epsilon(wrong: Any) -> None:
    """Not a number, or not between 0 and 1: the lower bound would be negative."""
    is_number = isinstance(wrong, float)
    with pytest.raises(ConfigError, match="clip epsilon" if is_number else "must be a ClipRange or an epsilon"):
        ClipRange.of(wrong)
    with pytest.raises(ConfigError):
        ClipRange.from_epsilon(wrong)


@pytest.mark.parametrize("wrong", [True, "0.2", [0.2], math.nan, -0.1])
def test_what_is_no_upper_epsilon(wrong: Any) -> None:
    """It may be above 1, but not below 0."""
    with pytest.raises(ConfigError, match="clip epsilon"):
        ClipRange.from_epsilon(0.2, wrong)


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.1, 2.0), (-0.1, 2.0), (0.5, 0.9), (0.5, True), (0.5, "2"), (True, 2.0), (0.5, math.nan), (0.5, None)],
)
def test_a_range_contains_one(low: Any, high: Any) -> None:
    """Its bounds are absolute ratios, on either side of 1 or 1 itself."""
    with pytest.raises(ConfigError):
        ClipRange(low, high)


def test_both_bounds_may_be_one() -> None:
    """Or the outermost ones."""
    assert (ClipRange(1.0, 1.0).low, ClipRange(0.0, math.inf).high, ClipRange(0, 1).high) == (1.0, math.inf, 1)


@pytest.mark.parametrize(
    ("dual", "clip", "words"),
    [
        (1.0, ClipRange(0.5, math.inf), "dual_clip"),
        (0.5, ClipRange(0.5, math.inf), "dual_clip"),
        (3.0, None, "without clip there is no first"),
        (1.2, ClipRange(0.8, 1.2), "above the clip range"),
        (1.1, ClipRange(0.8, 1.2), "above the clip range"),
        (math.inf, ClipRange(0.8, 1.2), "dual_clip"),
    ],
)
def test_a_dual_bound_lies_above_the_range(dual: float, clip: ClipRange | None, words: str) -> None:
    """And above 1; without a range there is nothing to add it to."""
    with pytest.raises(ConfigError, match=words):
        check_dual_clip(dual, clip)


def test_dual_bounds_that_fit() -> None:
    """The next number above the range, any above 1 where there is no upper bound, or none."""
    check_dual_clip(math.nextafter(1.2, 2.0), ClipRange(0.8, 1.2))
    check_dual_clip(1.5, ClipRange(0.8, math.inf))
    check_dual_clip(None, None)
    check_dual_clip(None, ClipRange(0.8, 1.2))
    assert PPO(dual_clip=3.0).dual_clip == 3.0

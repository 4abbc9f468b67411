"""How much of the suite runs: ``PULLBACK_TIER`` is ``quick`` (the default), ``all`` or ``soak``."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["SOAK", "TIER", "TIERS", "reason_to_skip", "sampled"]

TIERS = ("quick", "all", "soak")
TIER = os.environ.get("PULLBACK_TIER", "quick")
SOAK = TIER == "soak"
_FIRST = {
    "slow": ("all", "a slow test, of whose kind the quick tier has a sample: run it by `make test-all`"),
    "soak": ("soak", "a long proof: run it by `make soak`"),
}

if TIER not in TIERS:
    raise ValueError(f"PULLBACK_TIER is {TIER!r}; known tiers are {', '.join(TIERS)}")


def reason_to_skip(marker: str, tier: str = TIER) -> str | None:
    """Return why a test with this marker is not part of a tier, or None where it is."""
    if marker not in _FIRST:
        return None
    first, reason = _FIRST[marker]
    return reason if TIERS.index(tier) < TIERS.index(first) else None


def sampled(cases: Iterable[Any], few: Collection[Any], *, several: bool = False) -> list[Any]:
    """Return cases of one kind as parameters of a test, of which ``few`` are in the quick tier and the others slow.

    With ``several``, a case is a tuple with a value for each of several parameters.
    """
    import pytest  # the tier is asked for where there are no tests, too

    slow = pytest.mark.slow
    return [case if case in few else pytest.param(*(case if several else (case,)), marks=slow) for case in cases]

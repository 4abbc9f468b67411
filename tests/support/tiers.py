"""How much of the suite runs: ``PULLBACK_TIER`` is ``quick`` (the default), ``all`` or ``soak``."""

from __future__ import annotations

import os

__all__ = ["SOAK", "TIER", "TIERS", "reason_to_skip"]

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

"""Means over all rows of a batch, those of which nothing is trained among them: what some peers divide by."""

from __future__ import annotations

from dataclasses import replace

from ..aggregation import Aggregation

__all__ = ["over_all_rows"]


def over_all_rows(aggregation: Aggregation | str) -> Aggregation:
    """Return a mean over sequences as the same one over all of them; it keeps its name."""
    return replace(Aggregation.of(aggregation), denominator="all_sequences")

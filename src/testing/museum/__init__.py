"""The bug museum: defects that this field has had, each in a few lines, with the check that finds it and its repair."""

from __future__ import annotations

from typing import Final

from .backends import BACKENDS
from .conduct import CONDUCT
from .data import DATA
from .exhibit import Exhibit, Kind
from .findings import Finding, examine
from .models import MODELS
from .policies import POLICIES
from .references import REFERENCES
from .shifts import SHIFTS
from .sums import SUMS
from .tokens import TOKENS

__all__ = ["EXHIBITS", "Exhibit", "Finding", "Kind", "examine"]

EXHIBITS: Final[tuple[Exhibit, ...]] = (
    *TOKENS,
    *SUMS,
    *POLICIES,
    *REFERENCES,
    *SHIFTS,
    *CONDUCT,
    *DATA,
    *MODELS,
    *BACKENDS,
)

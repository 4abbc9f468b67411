"""The bug museum: defects that this field's losses have had, each with the property that finds it."""

from __future__ import annotations

from typing import Final

from .exhibit import Exhibit
from .policies import POLICIES
from .tokens import TOKENS

__all__ = ["EXHIBITS", "Exhibit"]

EXHIBITS: Final[tuple[Exhibit, ...]] = (*TOKENS, *POLICIES)

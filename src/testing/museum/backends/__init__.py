"""The backends of the bug museum: each has a defect, and breaks a promise that is seen by the verbs alone."""

from __future__ import annotations

from typing import Final

from ..exhibit import Exhibit
from . import requests, scores, state, steps
from .relay import Relay

__all__ = ["BACKENDS"]

_MODULES: Final = (requests, scores, steps, state)

BACKENDS: Final[tuple[Exhibit, ...]] = tuple(
    piece.exhibit
    for module in _MODULES
    for piece in vars(module).values()
    if isinstance(piece, type) and issubclass(piece, Relay) and "exhibit" in vars(piece)
)

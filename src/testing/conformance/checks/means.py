"""Losses that are means, of each kind of denominator that this library has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["MEANS"]

MEANS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cross_entropy": {"aggregation": "token_mean"},
    "grpo": {"kl_beta": 0.1},
    "dpo": {},
    "orpo": {},
}

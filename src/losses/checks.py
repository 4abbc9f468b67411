"""Checks of hyperparameters, with one wording for all losses."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import ConfigError, suggestion

__all__ = ["choice", "number", "require"]


def number(
    name: str, value: object, *, low: float | None = None, high: float | None = None, strict: bool = True
) -> float:
    """Return ``value`` as a finite float within (low, high), or [low, high] if not ``strict``.

    Raises:
        ConfigError: it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    above = low is None or value > low or (not strict and value == low)
    below = high is None or value < high or (not strict and value == high)
    if not (above and below and math.isfinite(value)):
        raise ConfigError(f"{name} must be a finite number {_interval(low, high, strict)}, got {value!r}")
    return float(value)


def choice(name: str, value: object, known: Iterable[str]) -> None:
    """Check that ``value`` is one of the ``known`` spellings.

    Raises:
        ConfigError: it is not; the message lists them and suggests a close one.
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}{suggestion(str(value), known)}")


def require(holds: bool, name: str, words: str, value: object) -> None:
    """Check that ``value`` is what ``words`` say, where the caller found whether that ``holds``.

    Raises:
        ConfigError: it is not.
    """
    if not holds:
        raise ConfigError(f"{name} must be {words}, got {value!r}")


def _interval(low: float | None, high: float | None, strict: bool) -> str:
    bounds = [f"{'above' if strict else 'at least'} {low:g}"] if low is not None else []
    bounds += [f"{'below' if strict else 'at most'} {high:g}"] if high is not None else []
    return " and ".join(bounds)

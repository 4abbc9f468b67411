"""What torchrun tells each of the processes that it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ....errors import ConfigError

__all__ = ["process_count"]


def process_count(given: Mapping[str, str] = os.environ) -> int:
    """Return how many processes torchrun has started; 1 where it has not.

    Args:
        given: environment of this process.

    Raises:
        ConfigError: variables that it sets are missing, or hold no numbers that fit together; all of them are named.
    """
    count = _number(given.get("WORLD_SIZE", "1"))
    if count == 1:
        return count
    problems = [_problem(name, given.get(name), least, most) for name, least, most in _ranges(count)]
    if "MASTER_ADDR" not in given:
        problems.append("MASTER_ADDR is not set")
    found = [problem for problem in problems if problem]
    if found or count is None:
        raise ConfigError(
            f"the other processes cannot be found: {', '.join(found)}; start this with torchrun, which sets them, or unset "
            "WORLD_SIZE to work in this process alone"
        )
    return count


def _ranges(count: int | None) -> list[tuple[str, int, int | None]]:
    """Return the variables that are numbers, the smallest and the largest; a count that is none says nothing of ranks."""
    last = None if count is None or count < 1 else count - 1
    return [("WORLD_SIZE", 1, None), ("RANK", 0, last), ("MASTER_PORT", 0, 65535)]


def _problem(name: str, text: str | None, least: int, most: int | None) -> str | None:
    """Say what is wrong with a variable; None: nothing."""
    if text is None:
        return f"{name} is not set"
    number = _number(text)
    if number is not None and number >= least and (most is None or number <= most):
        return None
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    return f"{name} must be a whole number {wanted}, got {text!r}"


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None

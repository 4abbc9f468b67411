"""What every operation needs: a sequence number that is one, and whose fault an error is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PullbackError, RankError, RankFailedError, ServiceError, StorageError
from ..durability.answers import Failure
from ..wire.texts import words_of, writable

__all__ = ["failure_of", "number_of", "optional_number_of", "require_number"]


def failure_of(error: BaseException) -> Failure:
    """Say whose fault an error is: what was refused is the user's, what one process of several met alone is not.

    What one of several refuses, because it lies in its share of the data, is refused in that process's words.
    """
    if isinstance(error, RankFailedError) and error.refusal is not None:
        return Failure(writable(error.refusal), "user")
    if isinstance(error, StorageError):
        return Failure(str(error), "server")
    if isinstance(error, (PullbackError, ValueError, TypeError, KeyError)) and not isinstance(error, RankError):
        message = f"malformed request: no {error}" if isinstance(error, KeyError) else words_of(error)
        return Failure(message, "user")
    return Failure(writable(f"{type(error).__name__}: {error}"), "server")


def require_number(name: str, number: object) -> int:
    """Return a sequence number.

    Raises:
        ServiceError: it is none.
    """
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**62:
        raise ServiceError(f"{name} must be a whole number, got {number!r}")
    return number


def number_of(body: Mapping[str, Any], key: str) -> int:
    """Return the sequence number that a request has under a key.

    Raises:
        KeyError: there is none.
        ServiceError: it is no sequence number.
    """
    return require_number(key, body[key])


def optional_number_of(body: Mapping[str, Any], key: str) -> int | None:
    """Return the sequence number that a request has under a key, or None if it has none."""
    return None if body.get(key) is None else number_of(body, key)

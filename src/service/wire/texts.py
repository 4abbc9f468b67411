"""Texts of clients that hold half of a character: JSON can write a surrogate without its other half, UTF-8 cannot."""

from __future__ import annotations

import re
from typing import Any, Final

from ...errors import ServiceError

__all__ = ["require_writable", "words_of", "writable"]

_HALF: Final = re.compile("[\ud800-\udfff]")


def require_writable(name: str, text: Any) -> None:
    """Check a text that is looked up, or written down; what is no text is left to others.

    Raises:
        ServiceError: it holds half of a character.
    """
    if isinstance(text, str) and (half := _HALF.search(text)):
        raise ServiceError(f"{name} holds {_half(half[0])}")


def writable(text: str) -> str:
    """Return a text in which every half of a character is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def words_of(error: BaseException) -> str:
    """Return what an error says, of halves of characters in plain words."""
    if isinstance(error, UnicodeEncodeError):
        return f"a text of the request holds {_half(error.object[error.start])}"
    return writable(str(error))


def _half(character: str) -> str:
    return f"half of a character (\\u{ord(character):04x}, a surrogate without its other half): send whole characters"

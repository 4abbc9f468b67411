"""Messages as data sets hold them: ``role`` and ``content``, or ``from`` and ``value``; tools as lists or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import DatumError, suggestion
from ..chat.roles import ROLE_OF

__all__ = ["holds_null", "is_chat", "messages_of", "tools_of"]


def is_chat(name: str, value: Any) -> bool:
    """Whether a column holds messages, and not text.

    Raises:
        DatumError: it holds neither.
    """
    if isinstance(value, str):
        return False
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return True
    raise DatumError(f"column {name!r} must hold text or a list of messages, got {type(value).__name__}")


def messages_of(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the messages of a column with ``role`` and ``content``, without keys that hold nothing.

    Raises:
        DatumError: it holds no messages, or a sender that is not known.
    """
    if not is_chat(name, value):
        raise DatumError(f"column {name!r} must hold a list of messages, got text")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def tools_of(value: Any) -> list[Any] | None:
    """Return the tools of a column: a list, or a list in JSON.

    Raises:
        DatumError: it holds no list.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise DatumError(f"column 'tools' holds text that is no JSON: {error}") from error
    if value is None or isinstance(value, list):
        return value or None
    raise DatumError(f"column 'tools' must hold a list of schemas, or one in JSON, got {type(value).__name__}")


def holds_null(value: Any) -> bool:
    """Whether there is None in tool calls or schemas, which a template writes as null; tables fill it in for missing keys."""
    if isinstance(value, Mapping):
        return any(map(holds_null, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_null, value))
    return value is None


def _message(place: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DatumError(f"{place} must be a dict, got {type(message).__name__}")
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "from" not in kept and "value" not in kept:
        return kept
    if "role" in kept or kept.get("content") is not None:
        raise DatumError(f"{place} has both from/value and role/content; keep one of them")
    if not {"from", "value"} <= kept.keys():
        raise DatumError(f"{place} needs both from and value, got {', '.join(map(str, kept))}")
    sender = kept.pop("from")
    if sender not in ROLE_OF:
        hint = suggestion(str(sender), ROLE_OF)
        raise DatumError(
            f"{place} is from {sender!r}, of which the role is not known{hint}; known are {', '.join(ROLE_OF)}"
        )
    kept.pop("content", None)
    return {"role": ROLE_OF[sender], "content": kept.pop("value"), **kept}

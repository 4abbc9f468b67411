"""Which gradient operations a client has read the outcome of: a step that was sent blind must not run on half a window."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import final

__all__ = ["Unread"]


@dataclass
class _Operation:
    number: int
    read: int | None = None  # the moment


@final
class Unread:
    """The gradient operations of every model since its last step. A moment is a count of readings, not a time."""

    def __init__(self) -> None:
        self._moment = 0
        self._models: dict[str, dict[str, _Operation]] = {}
        self._lock = threading.Lock()

    @property
    def now(self) -> int:
        """This moment."""
        return self._moment

    def accepted(self, model: str, request: str, number: int) -> None:
        """Note a gradient operation; nothing happens if it has been noted."""
        with self._lock:
            self._models.setdefault(model, {}).setdefault(request, _Operation(number))

    def read(self, request: str) -> None:
        """Note that a client has the outcome of a request."""
        with self._lock:
            self._moment += 1
            for operations in self._models.values():
                if request in operations and operations[request].read is None:
                    operations[request].read = self._moment

    def behind(self, model: str, number: int, moment: int) -> list[str]:
        """Return the requests before ``number`` whose outcome the client had not read at a moment.

        Those that arrived after that moment are among them: a network that overtakes does not hide them.
        """
        with self._lock:
            operations = self._models.get(model, {})
            return [
                request
                for request, one in operations.items()
                if one.number < number and (one.read is None or one.read > moment)
            ]

    def stepped(self, model: str, number: int) -> None:
        """Forget what was before a step that has been made."""
        with self._lock:
            operations = self._models.get(model, {})
            self._models[model] = {request: one for request, one in operations.items() if one.number > number}

    def forget(self, model: str) -> None:
        """Forget a model."""
        with self._lock:
            self._models.pop(model, None)

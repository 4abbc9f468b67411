"""The gradient operations whose outcome a client has read: a step sent over an unacknowledged failure must not run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import final

__all__ = ["Acknowledgements"]


@dataclass
class _Operation:
    number: int
    acknowledged: int | None = None  # the moment


@final
class Acknowledgements:
    """The gradient operations of every model since its last step. A moment is a count of acknowledgements, not a time."""

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

    def acknowledge(self, request: str) -> None:
        """Note that a client has the outcome of a request."""
        with self._lock:
            self._moment += 1
            for operations in self._models.values():
                if request in operations and operations[request].acknowledged is None:
                    operations[request].acknowledged = self._moment

    def unacknowledged(self, model: str, number: int, moment: int) -> list[str]:
        """Return the requests before ``number`` whose outcome the client had not read at a moment.

        Those that arrived after that moment are among them: a network that overtakes does not hide them.
        """
        with self._lock:
            operations = self._models.get(model, {})
            return [
                request
                for request, operation in operations.items()
                if operation.number < number and (operation.acknowledged is None or operation.acknowledged > moment)
            ]

    def stepped(self, model: str, number: int) -> None:
        """Forget what was before a step that has been made."""
        with self._lock:
            operations = self._models.get(model, {})
            self._models[model] = {
                request: operation for request, operation in operations.items() if operation.number > number
            }

    def forget(self, model: str) -> None:
        """Forget a model."""
        with self._lock:
            self._models.pop(model, None)

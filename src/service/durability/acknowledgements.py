"""Gradient operations that failed, and when their client read of it: a step sent before that must not run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import final

__all__ = ["Acknowledgements", "FailedGradient"]


@dataclass(eq=False)
class FailedGradient:
    """A gradient operation of one model that failed.

    Attributes:
        number, text: its number and its error.
        told_by: requests whose answers tell of it: its own, and those of steps that were refused for it.
        acknowledged: the moment at which the client read one of them; None: not yet.
    """

    number: int
    text: str
    told_by: set[str]
    acknowledged: int | None = None


@final
class Acknowledgements:
    """The failed gradient operations of every model since its last step.

    A moment is a count of acknowledgements, not a time. What is kept lives in memory, as the gradients do.
    """

    def __init__(self) -> None:
        self._moment = 0
        self._models: dict[str, list[FailedGradient]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._models)

    @property
    def now(self) -> int:
        """This moment."""
        return self._moment

    def failed(self, model: str, request: str, number: int, text: str) -> None:
        """Note a gradient operation that failed, before its client can read of it."""
        with self._lock:
            self._models.setdefault(model, []).append(FailedGradient(number, text, {request}))

    def acknowledge(self, request: str) -> None:
        """Note that a client has the outcome of a request."""
        with self._lock:
            known = [f for failures in self._models.values() for f in failures if request in f.told_by]
            unknown = [failure for failure in known if failure.acknowledged is None]
            if unknown:
                self._moment += 1
            for failure in unknown:
                failure.acknowledged = self._moment

    def unacknowledged(self, model: str, number: int, moment: int) -> list[FailedGradient]:
        """Return the failures before ``number`` of which the client had not read at a moment.

        Those that arrived after that moment are among them: a network that overtakes does not hide them.
        """
        with self._lock:
            return [
                failure
                for failure in self._models.get(model, ())
                if failure.number < number and (failure.acknowledged is None or failure.acknowledged > moment)
            ]

    def refused(self, request: str, failures: list[FailedGradient]) -> None:
        """Note a step that was refused for failures: its answer tells of them too."""
        with self._lock:
            for failure in failures:
                failure.told_by.add(request)

    def stepped(self, model: str, number: int) -> None:
        """Forget what was before a step that has been made."""
        with self._lock:
            left = [failure for failure in self._models.pop(model, ()) if failure.number > number]
            if left:
                self._models[model] = left

    def forget(self, model: str) -> None:
        """Forget a model."""
        with self._lock:
            self._models.pop(model, None)

"""Gradient operations that failed, and when their client read of it: a step sent before that must not run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

__all__ = ["Acknowledgements", "FailedGradient"]


@dataclass(eq=False)
class FailedGradient:
    """A gradient operation of one model that failed.

    Attributes:
        number, text: its number and its error.
        place: how many had failed before it.
        acknowledged: the moment at which the client read of it; None: not yet.
    """

    number: int
    text: str
    place: int
    acknowledged: int | None = None


class _FailureReport(NamedTuple):
    """The failures that an answer reports: a model's, from one number to another, that had happened when it was given."""

    model: str
    first: int
    last: int
    places: int


@final
class Acknowledgements:
    """The failed gradient operations of every model since its last step.

    A client has read of a failure when it has fetched the answer of the gradient, or of a step that was refused for it. A
    moment is a count of acknowledgements, not a time. What is kept lives in memory, as the gradients do.
    """

    def __init__(self) -> None:
        self._moment, self._places = 0, 0
        self._failures: dict[str, list[FailedGradient]] = {}
        self._answers: dict[str, _FailureReport] = {}  # that nobody has read
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._failures) + len(self._answers)

    @property
    def now(self) -> int:
        """This moment."""
        return self._moment

    def failed(self, model: str, request: str, number: int, text: str) -> None:
        """Note a gradient operation that failed, before its client can read of it."""
        with self._lock:
            self._failures.setdefault(model, []).append(FailedGradient(number, text, self._places))
            self._places += 1
            self._answers[request] = _FailureReport(model, number, number, self._places)

    def refused(self, model: str, request: str, number: int) -> None:
        """Note a step that was refused for the failures before it, before its client can read of that."""
        with self._lock:
            self._answers[request] = _FailureReport(model, 0, number, self._places)

    def acknowledge(self, request: str) -> None:
        """Note that a client has the outcome of a request."""
        with self._lock:
            report = self._answers.pop(request, None)
            news = [] if report is None else [f for f in self._of(report) if f.acknowledged is None]
            if news:
                self._moment += 1
            for failure in news:
                failure.acknowledged = self._moment

    def unacknowledged(self, model: str, number: int, moment: int) -> list[FailedGradient]:
        """Return the failures before ``number`` of which the client had not read at a moment.

        Those that arrived after that moment are among them: a network that overtakes does not hide them.
        """
        with self._lock:
            return [
                failure
                for failure in self._failures.get(model, ())
                if failure.number < number and (failure.acknowledged is None or failure.acknowledged > moment)
            ]

    def stepped(self, model: str, number: int) -> None:
        """Forget what was before a step that has been made."""
        with self._lock:
            failures = self._failures.pop(model, [])
            left = [failure for failure in failures if failure.number > number]
            if left:
                self._failures[model] = left
            if failures:
                self._forget_answers(model, number)

    def forget(self, model: str) -> None:
        """Forget a model."""
        with self._lock:
            if self._failures.pop(model, None) is not None:
                self._forget_answers(model, None)

    def _of(self, report: _FailureReport) -> Iterator[FailedGradient]:
        for failure in self._failures.get(report.model, ()):
            if report.first <= failure.number <= report.last and failure.place < report.places:
                yield failure

    def _forget_answers(self, model: str, last: int | None) -> None:
        gone = [
            request
            for request, report in self._answers.items()
            if report.model == model and (last is None or report.last <= last)
        ]
        for request in gone:
            del self._answers[request]

"""The time that a service waits for a missing number, which passes when a test says so and not with the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pullback.service.queueing import queues

__all__ = ["Gaps"]


class _Timer:
    """A timer that nobody waits for."""

    def __init__(self, seconds: float, act: Callable[..., object], given: tuple[Any, ...]) -> None:
        self.act, self.given, self.daemon, self.runs = act, given, True, False

    def start(self) -> None:
        self.runs = True

    def cancel(self) -> None:
        self.runs = False


class Gaps:
    """Of all services that are made while the patch lasts: however slow the machine is, no number comes too late."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._timers: list[_Timer] = []
        patch.setattr(queues, "threading", SimpleNamespace(**{**vars(threading), "Timer": self._timer}))

    def _timer(self, *given: Any) -> _Timer:
        self._timers.append(_Timer(*given))
        return self._timers[-1]

    @property
    def waiting(self) -> int:
        """Return how many numbers are waited for."""
        return sum(timer.runs for timer in self._timers)

    def passed(self) -> None:
        """Give up every number that is missing now; at least one is."""
        overdue = [timer for timer in self._timers if timer.runs]
        assert overdue, "no number is missing"
        for timer in overdue:
            timer.cancel()
            timer.act(*timer.given)

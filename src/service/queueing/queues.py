"""Operations in the order of their numbers, also where a number comes late or never; and queues that have ended."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, final

from .turns import Task

__all__ = ["EndReasons", "Queue"]

_REMEMBERED: Final = 1000  # queues and sessions that have ended


@final
class Queue:
    """One model's operations: those before their turn, and those whose turn has come; not safe to use from several threads.

    Args:
        first: the number of the first operation.
        gap_seconds: how long operations wait for a number that is missing.
        overdue: is told, in a thread of its own, which number has not come in this time.

    Attributes:
        turn: the next number.
        waiting: operations by number that wait for a smaller one.
        ready: those whose turn has come; the first one may run.
    """

    def __init__(self, first: int, gap_seconds: float, overdue: Callable[[int], None]) -> None:
        self.turn, self._seconds, self._overdue = first, gap_seconds, overdue
        self.waiting: dict[int, Task] = {}
        self.ready: deque[Task] = deque()
        self._missing = first
        self._timer: threading.Timer | None = None

    def is_early(self, number: int | None) -> bool:
        """Whether a smaller number is missing."""
        return number is not None and number > self.turn

    def is_missed(self, number: int | None) -> bool:
        """Whether this is the number that others wait for."""
        return number == self.turn and bool(self.waiting)

    def add(self, task: Task) -> Task | None:
        """Put an operation in its place; return the one that may run now and could not before."""
        before = len(self.ready)
        if task.number is None:
            self.ready.append(task)
        else:
            self.waiting[task.number] = task
            while self.turn in self.waiting:
                self.ready.append(self.waiting.pop(self.turn))
                self.turn += 1
            self._watch()
        return self.ready[0] if self.ready and not before else None

    def ended(self, task: Task) -> Task | None:
        """Return the operation that may run when this one has ended."""
        if not self.ready or self.ready[0] is not task:
            return None
        self.ready.popleft()
        return self.ready[0] if self.ready else None

    def give_up(self, turn: int) -> list[Task]:
        """Go on behind all that wait for a number, and return them; none if it has come."""
        if self.turn != turn or not self.waiting:
            return []
        given_up = list(self.waiting.values())
        self.turn = max(self.waiting) + 1
        self.waiting.clear()
        self._watch()
        return given_up

    def close(self) -> list[Task]:
        """End the watch; return all operations but the first one that is ready."""
        left = [*itertools.islice(self.ready, 1, None), *self.waiting.values()]
        self.waiting.clear()
        self._watch()
        return left

    def _watch(self) -> None:
        if self._timer is not None and (not self.waiting or self._missing != self.turn):
            self._timer.cancel()
            self._timer = None
        if self.waiting and self._timer is None:
            self._missing = self.turn
            self._timer = threading.Timer(self._seconds, self._overdue, (self.turn,))
            self._timer.daemon = True
            self._timer.start()


@final
class EndReasons:
    """Why queues and sessions have ended, of those that ended last."""

    def __init__(self) -> None:
        self._reasons: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, name: str, why: str) -> None:
        """Remember why a queue, or all queues of a session, have ended."""
        self._reasons[name] = why
        while len(self._reasons) > _REMEMBERED:
            self._reasons.popitem(last=False)

    def why(self, queue: str) -> str | None:
        """Return why a queue has ended, or its session, after which it is named; None: it has not, or long ago."""
        return self._reasons.get(queue) or self._reasons.get(queue.partition(":")[0])

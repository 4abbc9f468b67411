"""Whose turn it is: owners one after another, each with a queue of its own."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias, final

from ..durability.answers import Answer, Failure
from .requirements import failure_of

__all__ = ["Slices", "Task", "Turns", "Work"]

_logger = logging.getLogger(__name__)

Slices: TypeAlias = Generator[None, None, Answer]
Work: TypeAlias = Callable[[], Answer | Slices]


@dataclass(eq=False)
class Task:
    """An accepted operation that has not ended.

    Attributes:
        owner, queue, number, request, kind: whose it is, and what.
        work: computes the answer, or returns a generator that does so in slices.
        answered: is told the request and its answer before anybody can read it.
        begun: it has had a turn.
        ended: why its queue has ended, if it has.
        seconds: that its slices have taken.
    """

    owner: str
    queue: str
    number: int | None
    request: str
    kind: str
    work: Work
    answered: Callable[[str, Answer], None] = lambda request, answer: None
    begun: bool = False
    ended: str | None = None
    seconds: float = 0.0
    slices: Slices | None = None

    def advance(self) -> Answer | None:
        """Run to the next pause, or to the end; return the answer, or None where it pauses.

        Raises:
            Exception: whatever the work raises.
        """
        if self.slices is None:
            result = self.work()
            if not isinstance(result, Generator):
                return result
            self.slices = result
        try:
            next(self.slices)
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        return None

    def slice(self) -> Answer | None:
        """Run a slice; return the answer, or None where it pauses. Whatever the work raises, the turn ends."""
        began = time.perf_counter()
        try:
            if self.ended is None:
                return self.advance()
            self.stop()
            return Failure(self.ended, "user")
        except BaseException as error:
            answer = failure_of(error)
            if answer.category == "server":
                _logger.exception("%s failed", self.kind)
            return answer
        finally:
            self.seconds += time.perf_counter() - began

    def stop(self) -> None:
        """Let a work that pauses clean up; it does not go on."""
        if self.slices is not None:
            self.slices.close()


@final
class Turns:
    """Tasks that can run, for one worker that takes one, runs a slice of it, and gives it back.

    An owner who has had a turn goes behind all others who wait, also behind those who came in the meantime. Not safe to use
    from several threads.

    Args:
        seconds: a turn goes on with the owner's next slice until its slices have taken so long: short ones, as that in which a
            request only enters a batch, must not each wait for a long one of another owner.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._owner, self._taken = "", 0.0  # who had the last slice, and what the turn has taken by then
        self._waiting: dict[str, deque[Task]] = {}  # by owner, in the order of their turns
        self._current: tuple[Task, deque[Task]] | None = None  # whose turn it is, and what else its owner has

    def __iter__(self) -> Iterator[Task]:
        """All tasks, among them the one whose turn it is."""
        if self._current is not None:
            yield from (self._current[0], *self._current[1])
        for tasks in self._waiting.values():
            yield from tasks

    def add(self, task: Task) -> None:
        """Put a task at the end of its owner's queue."""
        if self._current is not None and self._current[0].owner == task.owner:
            self._current[1].append(task)
        else:
            self._waiting.setdefault(task.owner, deque()).append(task)

    def take(self) -> Task | None:
        """Return the first task of the owner whose turn it is; None: nobody waits."""
        if not self._waiting:
            return None
        owner = next(iter(self._waiting))
        if owner != self._owner:
            self._owner, self._taken = owner, 0.0
        tasks = self._waiting.pop(owner)
        task = tasks.popleft()
        self._current = (task, tasks)
        return task

    def give_back(self, again: bool, seconds: float = 0.0) -> None:
        """End a slice, and the turn with it unless there is time left.

        Args:
            again: the task goes to the end of its owner's queue.
            seconds: that the slice has taken.
        """
        assert self._current is not None
        (task, tasks), self._current = self._current, None
        if again:
            tasks.append(task)
        self._taken += seconds
        if tasks and self._taken < self._seconds:
            self._waiting = {task.owner: tasks, **self._waiting}
            return
        self._taken = 0.0
        if tasks:
            self._waiting[task.owner] = tasks

    def remove(self, task: Task) -> None:
        """Take out a task whose turn it is not."""
        current = self._current[1] if self._current is not None and self._current[0].owner == task.owner else None
        tasks = self._waiting[task.owner] if current is None else current
        tasks.remove(task)
        if current is None and not tasks:
            del self._waiting[task.owner]

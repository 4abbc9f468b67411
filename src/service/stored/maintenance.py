"""The maintenance of a server's folder, beside the event loop: what is old is deleted, and the log is written back."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final, final

from ..durability.checkpoints import Checkpoints
from ..durability.journal import ANSWER_SECONDS, Journal
from ..durability.recovery import sweep
from ..durability.retention import bound_answers, prune
from ..limits import Limits
from ..served.sessions import Sessions

__all__ = ["Maintenance"]

_PRUNE_SECONDS: Final = 3600.0


@final
class Maintenance:
    """Deletes checkpoints whose time to live has passed, what is old in the journal, and answers that are too many.

    Nothing old leaves the journal in the first hour: clients that outlive a server are heard of until then.

    Args:
        checkpoints: on the disk.
        journal: what is noted.
        sessions: says who was heard of lately.
        alive: returns the ids of the models and samplers in memory.
        answer_bytes: of answers that are kept.
        clock: seconds, of any beginning.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        journal: Journal,
        sessions: Sessions,
        alive: Callable[[], Collection[str]] = tuple,
        answer_bytes: int = Limits().answer_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints, self._journal, self._sessions, self._clock = checkpoints, journal, sessions, clock
        self._alive, self._answer_bytes = alive, answer_bytes
        self._pruned = clock()

    def work(self) -> None:
        """Do what is due; it may wait for the disk."""
        sweep(self._checkpoints, self._journal)
        if self._clock() - self._pruned >= _PRUNE_SECONDS:
            self._pruned = self._clock()
            alive = self._sessions.heard_of(ANSWER_SECONDS) | {model.partition(":")[0] for model in self._alive()}
            prune(self._journal, time.time(), alive)
        bound_answers(self._journal, self._answer_bytes)
        self._journal.database.write_back()

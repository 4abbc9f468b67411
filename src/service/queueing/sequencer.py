"""Operations in the order of their sequence numbers, each once, whatever the network does to their arrival."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

from ...errors import ServiceError, StorageError
from ..durability.answers import Answer, Failure
from ..durability.journal import ANSWER_SECONDS, Journal
from ..limits import Limits
from .backlog import Backlog
from .queues import EndReasons, Queue
from .requirements import failure_of
from .turns import Task, Turns, Work

__all__ = ["Sequencer"]

_logger = logging.getLogger(__name__)
Observer = Callable[[str, Answer, float], None]
Answered = Callable[[str, Answer], None]


@final
class Sequencer:
    """Accepts numbered operations at once and runs them in one worker thread.

    The operations of a queue run one after another, in the order of their numbers. Owners take turns, each with one operation,
    or one slice of an operation whose work is a generator: one that has had its turn goes behind all others who wait.

    A number that comes again with the same payload gets the first answer; with another payload it is refused. A failed
    operation has had its turn: those after it run. A number that never comes is given up after a while, as a failure.

    Args:
        journal: where every operation and its answer is written.
        limits: how many operations may wait or run, and how long they wait for a number that is missing.
        observer: is told kind, answer and seconds of every operation that ran.
        turn_seconds: a turn goes on with the same owner's next operations until they have taken so long.
    """

    def __init__(
        self,
        journal: Journal,
        limits: Limits | None = None,
        observer: Observer = lambda kind, answer, seconds: None,
        turn_seconds: float = 0.0,
    ) -> None:
        limits = limits or Limits()
        self._journal, self._gap, self._observer = journal, limits.gap_seconds, observer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pullback-worker")
        self._turns, self._background = Turns(turn_seconds), deque[Callable[[], Any]]()
        self._queues: dict[str, Queue] = {}
        self._end_reasons = EndReasons()
        self._backlog = Backlog(limits)
        self._lock = threading.RLock()
        self._count = itertools.count(1)
        self._closed = False

    @property
    def queued(self) -> int:
        """Operations that wait or run."""
        return len(self._backlog)

    def open(self, queue: str, first: int = 1) -> None:
        """Begin a queue of ordered operations; nothing happens if it has begun.

        Args:
            queue: its name, which begins with the session that it belongs to and a colon.
            first: the number of its first operation.
        """
        with self._lock:
            if queue not in self._queues:
                self._queues[queue] = Queue(first, self._gap, functools.partial(self._give_up, queue))

    def end(self, queue: str, why: str) -> None:
        """Let every further operation of a queue fail with this message; one in slices stops at its next pause."""
        with self._lock:
            self._end_reasons.add(queue, why)
            state = self._queues.pop(queue, None)
            early = 0 if state is None else len(state.waiting)
            dropped = [] if state is None else state.close()
            for task in [task for task in self._turns if task.queue == queue]:
                if task.begun:
                    task.ended = why
                else:
                    self._turns.remove(task)
                    dropped.append(task)
            if dropped:
                self._backlog.waits(dropped[0].owner, -early)
            for task in dropped:
                self._finish(task, Failure(why, "user"))

    def end_session(self, session: str, why: str) -> None:
        """Let every further operation of all queues of a session fail with this message."""
        with self._lock:
            self._end_reasons.add(session, why)
            queues = {*self._queues, *(task.queue for task in self._turns)}
            for queue in sorted(queue for queue in queues if queue.startswith(f"{session}:")):
                self.end(queue, why)

    def knows(self, queue: str) -> bool:
        """Whether a queue is open or is remembered to have ended."""
        return queue in self._queues or self._end_reasons.why(queue) is not None

    def submit(
        self,
        owner: str,
        queue: str,
        number: int | None,
        payload: bytes,
        kind: str,
        work: Work,
        *,
        ordered: bool = True,
        answered: Answered = lambda request, answer: None,
    ) -> str:
        """Accept an operation; return its request id.

        Args:
            owner: who may read the answer.
            queue: the model or session that it belongs to; it must be open for ordered operations.
            number: makes it the same operation when it comes again; None: it is new each time.
            payload: what must be the same then.
            kind: for logs and counters.
            work: runs in the worker, at once or (a generator) in slices.
            ordered: it waits for all smaller numbers of its queue; without a number, for all whose turn has come.
            answered: is told the request and its answer before anybody can read it, whether or not the work was run.

        Raises:
            ServiceError: no such queue, or the number was used for another payload.
            BusyError: too many wait already.
        """
        digest = hashlib.sha256(kind.encode() + payload).hexdigest()
        with self._lock:
            before = None if number is None else self._journal.numbered(queue, number)
            if before is not None:
                if before.digest != digest:
                    raise ServiceError(f"seq_id {number} of {queue} was used for another request; numbers go up by one")
                return before.request
            why, state = self._end_reasons.why(queue), self._queues.get(queue)
            if ordered and state is None and why is None:
                raise ServiceError(f"{queue!r} was never created on this server")
            early = ordered and state is not None and state.is_early(number)
            missed = ordered and state is not None and state.is_missed(number)
            self._backlog.require_room(owner, early=early, fills=missed)
            request = self._accept(owner, queue, number, digest, kind)
            task = Task(owner, queue, number, request, kind, work, answered)
            if why is not None:
                self._finish(task, Failure(why, "user"))
            elif state is None or not ordered:
                self._start(task)
            else:
                self._enqueue(state, task)
            return request

    def result(self, owner: str, request: str) -> Future[Answer]:
        """Return the future of an accepted operation; it resolves to the answer or a `Failure`, never raises.

        Raises:
            ServiceError: no such request of this owner.
        """
        with self._lock:
            pending = self._backlog.future(owner, request)
        if pending is not None:
            return pending
        future = Future[Answer]()
        try:
            operation = self._journal.operation(request)
        except StorageError as error:  # as a status of 5xx, it would be asked again for ever
            future.set_result(failure_of(error))
            return future
        if operation is None or operation.owner != owner:
            raise ServiceError(f"unknown request {request!r}{self._journal.caveat}")
        if operation.answer is None:
            hours = ANSWER_SECONDS / 3600
            kept = f"answers are kept for {hours:g} hours, or until too many have followed"
            future.set_result(Failure(f"the answer to {request} was thrown away: {kept}", "user"))
        else:
            future.set_result(operation.answer)
        return future

    def run(self, work: Callable[[], Any]) -> None:
        """Run something short in the worker that no client waits for, before all operations that have not begun."""
        with self._lock:
            self._background.append(work)
            self._wake()

    def close(self) -> None:
        """Finish what runs and drop what waits."""
        with self._lock:
            self._closed = True
            for state in self._queues.values():
                state.close()
        self._worker.shutdown(cancel_futures=True)
        for task in self._turns:
            _logged(task.stop)

    def _accept(self, owner: str, queue: str, number: int | None, digest: str, kind: str) -> str:
        count = next(self._count)
        request = f"req-{count}-{secrets.token_hex(8)}"
        self._journal.accept(request, owner, queue, number, digest, kind)
        self._backlog.add(owner, request)
        return request

    def _enqueue(self, state: Queue, task: Task) -> None:
        if task.number is not None and task.number < state.turn:
            failure = Failure(f"seq_id {task.number} was given up: it came after {self._gap:g} s", "user")
            self._finish(task, failure)
            return
        early = len(state.waiting)
        first = state.add(task)
        self._backlog.waits(task.owner, len(state.waiting) - early)
        if first is not None:
            self._start(first)

    def _give_up(self, queue: str, turn: int) -> None:
        """Fail what waits behind a number that did not come: what it was is not known, so nothing may build on it."""
        with self._lock:
            state = self._queues.get(queue)
            given_up = [] if state is None else state.give_up(turn)
            why = f"seq_id {turn} of {queue} did not arrive within {self._gap:g} s, so nothing sent after it was run"
            for task in given_up:
                self._backlog.waits(task.owner, -1)
                self._finish(task, Failure(why, "user"))

    def _start(self, task: Task) -> None:
        self._turns.add(task)
        self._wake()

    def _wake(self) -> None:
        """Let the worker run a slice of whatever is next; nothing is, once it has been closed."""
        if not self._closed:
            self._worker.submit(self._turn)

    def _turn(self) -> None:
        """Run what no client waits for; if there is nothing, a slice of the operation whose turn it is."""
        with self._lock:
            if self._background:
                task, work = None, self._background.popleft()
            elif (task := self._turns.take()) is None:
                return  # it was dropped
            else:
                task.begun = True
        if task is None:
            _logged(work)
        else:
            self._advance(task)

    def _advance(self, task: Task) -> None:
        before = task.seconds
        answer = task.slice()
        seconds = task.seconds - before
        with self._lock:
            if answer is None:
                self._turns.give_back(True, seconds)
                self._wake()
                return
            state = self._queues.get(task.queue)
            following = None if state is None else state.ended(task)
            if following is not None:
                self._start(following)
            self._turns.give_back(False, seconds)
        self._finish(task, answer)
        _logged(lambda: self._observer(task.kind, answer, task.seconds))

    def _finish(self, task: Task, answer: Answer) -> None:
        kept = True
        try:
            self._journal.finish(task.request, answer)
        except Exception as error:
            # It stays pending, so that it is answered from memory, and a disk that stays full stops new work.
            _logger.exception("the journal cannot be written")
            message = f"it ran, but its answer could not be kept ({error}): go on from the last checkpoint"
            answer, kept = Failure(message, "server"), False
        _logged(lambda: task.answered(task.request, answer))
        with self._lock:
            future = self._backlog.end(task.request, keep=not kept)
        future.set_result(answer)


def _logged(work: Callable[[], Any]) -> None:
    try:
        work()
    except Exception:
        _logger.exception("work in the background failed")

"""Operations in the order of their sequence numbers, each once, whatever the network does to their arrival."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, final

from ...errors import BusyError, ServiceError
from .journal import Answer, Failure, Journal
from .requirements import failure_of, number_of, require_number
from .turns import Task, Turns, Work

__all__ = ["Sequencer", "failure_of", "number_of", "require_number"]

_logger = logging.getLogger(__name__)
_KEPT_SECONDS: Final = 24 * 3600.0
_PRUNE_EVERY: Final = 1000  # operations
Observer = Callable[[str, Answer, float], None]


@dataclass
class _Queue:
    """One model's operations: the next number whose turn it is, those that came early, and those that can run.

    Attributes:
        ready: the first of them is in its owner's line, or runs.
    """

    turn: int
    waiting: dict[int, Task] = field(default_factory=dict)
    ready: deque[Task] = field(default_factory=deque)
    timer: threading.Timer | None = None


@final
class Sequencer:
    """Accepts numbered operations at once and runs them in one worker thread.

    The operations of a queue run one after another, in the order of their numbers. Owners take turns, each with one operation,
    or one slice of an operation whose work is a generator: one that has had its turn goes behind all others who wait.

    A number that comes again with the same payload gets the first answer; with another payload it is refused. A failed
    operation has had its turn: those after it run. A number that never comes is given up after a while, as a failure.

    Args:
        journal: where every operation and its answer is written.
        max_queue: operations that may wait or run together.
        gap_seconds: how long operations wait for a number that is missing.
        observer: is told kind, answer and seconds of every operation that ran.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        max_queue: int = 1024,
        gap_seconds: float = 60.0,
        observer: Observer = lambda kind, answer, seconds: None,
    ) -> None:
        self._journal, self._max_queue, self._gap = journal, max_queue, gap_seconds
        self._observer = observer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pullback-worker")
        self._turns, self._background = Turns(), deque[Callable[[], Any]]()
        self._queues: dict[str, _Queue] = {}
        self._gone: dict[str, str] = {}
        self._pending: dict[str, tuple[str, Future[Answer]]] = {}
        self._lock = threading.RLock()
        self._count = itertools.count(1)

    @property
    def queued(self) -> int:
        """Operations that wait or run."""
        return len(self._pending)

    def open(self, queue: str, first: int = 1) -> None:
        """Begin a queue of operations; nothing happens if it has begun."""
        with self._lock:
            self._queues.setdefault(queue, _Queue(first))

    def end(self, queue: str, why: str) -> None:
        """Let every further operation of a queue fail with this message; one in slices stops at its next pause."""
        with self._lock:
            self._gone[queue] = why
            state = self._queues.pop(queue, None)
            dropped = [] if state is None else [*state.waiting.values(), *itertools.islice(state.ready, 1, None)]
            if state is not None and state.timer is not None:
                state.timer.cancel()
            for task in [task for task in self._turns if task.queue == queue]:
                if task.begun:
                    task.ended = why
                else:
                    self._turns.remove(task)
                    dropped.append(task)
            for task in dropped:
                self._finish(task.request, Failure(why, "user"))

    def knows(self, queue: str) -> bool:
        """Whether a queue is open or has ended."""
        return queue in self._queues or queue in self._gone

    def submit(
        self, owner: str, queue: str, number: int | None, payload: bytes, kind: str, work: Work, *, ordered: bool = True
    ) -> str:
        """Accept an operation; return its request id.

        Args:
            owner: who may read the answer.
            queue: the model or session that it belongs to.
            number: makes it the same operation when it comes again; None: it is new each time.
            payload: what must be the same then.
            kind: for logs and counters.
            work: runs in the worker, at once or (a generator) in slices.
            ordered: it waits for all smaller numbers of its queue; without a number, for all whose turn has come.

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
            if queue not in self._queues and queue not in self._gone:
                raise ServiceError(f"{queue!r} was never created on this server")
            if len(self._pending) >= self._max_queue:
                raise BusyError(f"{len(self._pending)} operations wait already; try again later")
            request = self._accept(owner, queue, number, digest, kind)
            task = Task(owner, queue, request, kind, work, ordered)
            if queue in self._gone:
                self._finish(request, Failure(self._gone[queue], "user"))
            elif not ordered:
                self._start(task)
            elif number is None:
                self._make_ready(task)
            else:
                self._enqueue(number, task)
            return request

    def result(self, owner: str, request: str) -> Future[Answer]:
        """Return the future of an accepted operation; it resolves to the answer or a `Failure`, never raises.

        Raises:
            ServiceError: no such request of this owner.
        """
        with self._lock:
            if request in self._pending and self._pending[request][0] == owner:
                return self._pending[request][1]
        operation = self._journal.operation(request)
        if operation is None or operation.owner != owner:
            raise ServiceError(f"unknown request {request!r}")
        future: Future[Answer] = Future()
        if operation.answer is None:
            hours = _KEPT_SECONDS / 3600
            future.set_result(Failure(f"the answer to {request} was thrown away after {hours:g} hours", "user"))
        else:
            future.set_result(operation.answer)
        return future

    def run(self, work: Callable[[], Any]) -> None:
        """Run something short in the worker that no client waits for, before all operations that have not begun."""
        self._background.append(work)
        self._worker.submit(self._turn)

    def close(self) -> None:
        """Finish what runs and drop what waits."""
        with self._lock:
            for state in self._queues.values():
                if state.timer is not None:
                    state.timer.cancel()
        self._worker.shutdown(cancel_futures=True)
        for task in self._turns:
            _logged(task.stop)

    def _accept(self, owner: str, queue: str, number: int | None, digest: str, kind: str) -> str:
        count = next(self._count)
        request = f"req-{count}-{secrets.token_hex(8)}"
        self._journal.accept(request, owner, queue, number, digest, kind)
        self._pending[request] = (owner, Future())
        if count % _PRUNE_EVERY == 0:
            self._journal.forget_answers(time.time() - _KEPT_SECONDS)
        return request

    def _enqueue(self, number: int, task: Task) -> None:
        state = self._queues[task.queue]
        if number < state.turn:
            failure = Failure(f"seq_id {number} was given up: it came after {self._gap:g} s", "user")
            self._finish(task.request, failure)
            return
        state.waiting[number] = task
        before = state.turn
        while state.turn in state.waiting:
            self._make_ready(state.waiting.pop(state.turn))
            state.turn += 1
        if state.timer is not None and state.turn != before:
            state.timer.cancel()
            state.timer = None
        if state.waiting and state.timer is None:
            state.timer = threading.Timer(self._gap, self._give_up, (task.queue, state.turn))
            state.timer.daemon = True
            state.timer.start()

    def _make_ready(self, task: Task) -> None:
        ready = self._queues[task.queue].ready
        ready.append(task)
        if len(ready) == 1:
            self._start(task)

    def _give_up(self, queue: str, turn: int) -> None:
        """Fail what waits behind a number that did not come: what it was is not known, so nothing may build on it."""
        with self._lock:
            state = self._queues.get(queue)
            if state is None or state.turn != turn or not state.waiting:
                return
            why = f"seq_id {turn} of {queue} did not arrive within {self._gap:g} s, so nothing sent after it was run"
            last = max(state.waiting)
            for task in state.waiting.values():
                self._finish(task.request, Failure(why, "user"))
            state.waiting.clear()
            state.turn, state.timer = last + 1, None

    def _start(self, task: Task) -> None:
        self._turns.add(task)
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
        answer = self._slice(task)
        with self._lock:
            if answer is None:
                self._turns.give_back(again=True)
                self._worker.submit(self._turn)
                return
            state = self._queues.get(task.queue)
            if state is not None and state.ready and state.ready[0] is task:
                state.ready.popleft()
                if state.ready:
                    self._start(state.ready[0])
            self._turns.give_back(again=False)
        self._finish(task.request, answer)
        _logged(lambda: self._observer(task.kind, answer, task.seconds))

    def _slice(self, task: Task) -> Answer | None:
        began = time.perf_counter()
        try:
            if task.ended is None:
                return task.advance()
            task.stop()
            return Failure(task.ended, "user")
        except Exception as error:
            answer = failure_of(error)
            if answer.category == "server":
                _logger.exception("%s failed", task.kind)
            return answer
        finally:
            task.seconds += time.perf_counter() - began

    def _finish(self, request: str, answer: Answer) -> None:
        try:
            self._journal.finish(request, answer)
        except Exception as error:
            # It stays pending, so that it is answered from memory, and a disk that stays full stops new work.
            _logger.exception("the journal cannot be written")
            message = f"it ran, but its answer could not be kept ({error}): go on from the last checkpoint"
            self._pending[request][1].set_result(Failure(message, "server"))
            return
        with self._lock:
            _, future = self._pending.pop(request)
        future.set_result(answer)


def _logged(work: Callable[[], Any]) -> None:
    try:
        work()
    except Exception:
        _logger.exception("work in the background failed")

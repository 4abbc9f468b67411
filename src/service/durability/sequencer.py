"""Operations in the order of their sequence numbers, each once, whatever the network does to their arrival."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, final

from ...errors import BusyError, PullbackError, ServiceError
from .journal import Answer, Failure, Journal

__all__ = ["Sequencer", "failure_of", "number_of", "require_number"]

_logger = logging.getLogger(__name__)
_KEPT_SECONDS: Final = 24 * 3600.0
_PRUNE_EVERY: Final = 1000  # operations
Work = Callable[[], Answer]
Observer = Callable[[str, Answer, float], None]


def failure_of(error: BaseException) -> Failure:
    """Say whose fault an error is: what was refused is the user's."""
    if isinstance(error, (PullbackError, ValueError, TypeError, KeyError)):
        message = f"malformed request: no {error}" if isinstance(error, KeyError) else str(error)
        return Failure(message, "user")
    return Failure(f"{type(error).__name__}: {error}", "server")


@dataclass
class _Queue:
    """One model's operations: the next number whose turn it is, and those that came early."""

    turn: int
    waiting: dict[int, tuple[str, str, Work]] = field(default_factory=dict)
    timer: threading.Timer | None = None


@final
class Sequencer:
    """Accepts numbered operations at once and runs them one after another in one worker thread.

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
        """Let every further operation of a queue fail with this message."""
        with self._lock:
            self._gone[queue] = why
            state = self._queues.pop(queue, None)
            for request, _, _ in () if state is None else state.waiting.values():
                self._finish(request, Failure(why, "user"))

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
            work: runs in the worker.
            ordered: it waits for all smaller numbers of its queue.

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
            if queue in self._gone:
                self._finish(request, Failure(self._gone[queue], "user"))
            elif ordered and number is not None:
                self._enqueue(queue, number, request, kind, work)
            else:
                self._start(queue, request, kind, work)
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
        """Run something in the worker that no client waits for."""
        self._worker.submit(_logged, work)

    def close(self) -> None:
        """Finish what runs and drop what waits."""
        with self._lock:
            for state in self._queues.values():
                if state.timer is not None:
                    state.timer.cancel()
        self._worker.shutdown(cancel_futures=True)

    def _accept(self, owner: str, queue: str, number: int | None, digest: str, kind: str) -> str:
        count = next(self._count)
        request = f"req-{count}-{secrets.token_hex(8)}"
        self._journal.accept(request, owner, queue, number, digest, kind)
        self._pending[request] = (owner, Future())
        if count % _PRUNE_EVERY == 0:
            self._journal.forget_answers(time.time() - _KEPT_SECONDS)
        return request

    def _enqueue(self, queue: str, number: int, request: str, kind: str, work: Work) -> None:
        state = self._queues[queue]
        if number < state.turn:
            self._finish(request, Failure(f"seq_id {number} was given up: it came after {self._gap:g} s", "user"))
            return
        state.waiting[number] = (request, kind, work)
        self._advance(queue)

    def _advance(self, queue: str) -> None:
        state = self._queues[queue]
        while state.turn in state.waiting:
            self._start(queue, *state.waiting.pop(state.turn))
            state.turn += 1
        if state.timer is not None:
            state.timer.cancel()
            state.timer = None
        if state.waiting:
            state.timer = threading.Timer(self._gap, self._give_up, (queue, state.turn))
            state.timer.daemon = True
            state.timer.start()

    def _give_up(self, queue: str, turn: int) -> None:
        """Fail what waits behind a number that did not come: what it was is not known, so nothing may build on it."""
        with self._lock:
            state = self._queues.get(queue)
            if state is None or state.turn != turn or not state.waiting:
                return
            why = f"seq_id {turn} of {queue} did not arrive within {self._gap:g} s, so nothing sent after it was run"
            last = max(state.waiting)
            for request, _, _ in state.waiting.values():
                self._finish(request, Failure(why, "user"))
            state.waiting.clear()
            state.turn, state.timer = last + 1, None

    def _start(self, queue: str, request: str, kind: str, work: Work) -> None:
        self._worker.submit(self._work, queue, request, kind, work)

    def _work(self, queue: str, request: str, kind: str, work: Work) -> None:
        began, ended = time.perf_counter(), self._gone.get(queue)
        try:
            answer = work() if ended is None else Failure(ended, "user")
        except Exception as error:
            answer = failure_of(error)
            if answer.category == "server":
                _logger.exception("%s failed", kind)
        self._finish(request, answer)
        _logged(lambda: self._observer(kind, answer, time.perf_counter() - began))

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


def require_number(name: str, number: object) -> int:
    """Return a sequence number.

    Raises:
        ServiceError: it is none.
    """
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**62:
        raise ServiceError(f"{name} must be a whole number, got {number!r}")
    return number


def number_of(body: Mapping[str, Any], key: str) -> int:
    """Return the sequence number that a request has under a key."""
    return require_number(key, body[key])

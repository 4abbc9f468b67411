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
        words = f"malformed request: no {error}" if isinstance(error, KeyError) else str(error)
        return Failure(words, "user")
    return Failure(f"{type(error).__name__}: {error}", "server")


@dataclass
class _Line:
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
        self._lines: dict[str, _Line] = {}
        self._gone: dict[str, str] = {}
        self._pending: dict[str, tuple[str, Future[Answer]]] = {}
        self._lock = threading.RLock()
        self._count = itertools.count(1)

    @property
    def queued(self) -> int:
        """Operations that wait or run."""
        return len(self._pending)

    def open(self, line: str, first: int = 1) -> None:
        """Begin a line of operations; nothing happens if it has begun."""
        with self._lock:
            self._lines.setdefault(line, _Line(first))

    def end(self, line: str, why: str) -> None:
        """Let every further operation of a line fail with these words."""
        with self._lock:
            self._gone[line] = why
            one = self._lines.pop(line, None)
            for request, _, _ in () if one is None else one.waiting.values():
                self._finish(request, Failure(why, "user"))

    def knows(self, line: str) -> bool:
        """Whether a line is open or has ended."""
        return line in self._lines or line in self._gone

    def submit(
        self, owner: str, line: str, number: int | None, payload: bytes, kind: str, work: Work, *, ordered: bool = True
    ) -> str:
        """Accept an operation; return its request id.

        Args:
            owner: who may read the answer.
            line: what it belongs to.
            number: makes it the same operation when it comes again; None: it is new each time.
            payload: what must be the same then.
            kind: for logs and counters.
            work: runs in the worker.
            ordered: it waits for all smaller numbers of its line.

        Raises:
            ServiceError: no such line, or the number was used for another payload.
            BusyError: too many wait already.
        """
        digest = hashlib.sha256(kind.encode() + payload).hexdigest()
        with self._lock:
            before = None if number is None else self._journal.numbered(line, number)
            if before is not None:
                if before.digest != digest:
                    raise ServiceError(f"seq_id {number} of {line} was used for another request; numbers go up by one")
                return before.request
            if line not in self._lines and line not in self._gone:
                raise ServiceError(f"{line!r} was never created on this server")
            if len(self._pending) >= self._max_queue:
                raise BusyError(f"{len(self._pending)} operations wait already; try again later")
            request = self._accept(owner, line, number, digest, kind)
            if line in self._gone:
                self._finish(request, Failure(self._gone[line], "user"))
            elif ordered and number is not None:
                self._enqueue(line, number, request, kind, work)
            else:
                self._start(line, request, kind, work)
            return request

    def result(self, owner: str, request: str) -> Future[Answer]:
        """Return the future of an accepted operation; it resolves to the answer or a `Failure`, never raises.

        Raises:
            ServiceError: no such request of this owner.
        """
        with self._lock:
            if request in self._pending and self._pending[request][0] == owner:
                return self._pending[request][1]
        found = self._journal.operation(request)
        if found is None or found.owner != owner:
            raise ServiceError(f"unknown request {request!r}")
        future: Future[Answer] = Future()
        if found.answer is None:
            hours = _KEPT_SECONDS / 3600
            future.set_result(Failure(f"the answer to {request} was thrown away after {hours:g} hours", "user"))
        else:
            future.set_result(found.answer)
        return future

    def run(self, work: Callable[[], Any]) -> None:
        """Run something in the worker that no client waits for."""
        self._worker.submit(_logged, work)

    def close(self) -> None:
        """Finish what runs and drop what waits."""
        with self._lock:
            for one in self._lines.values():
                if one.timer is not None:
                    one.timer.cancel()
        self._worker.shutdown(cancel_futures=True)

    def _accept(self, owner: str, line: str, number: int | None, digest: str, kind: str) -> str:
        count = next(self._count)
        request = f"req-{count}-{secrets.token_hex(8)}"
        self._journal.accept(request, owner, line, number, digest, kind)
        self._pending[request] = (owner, Future())
        if count % _PRUNE_EVERY == 0:
            self._journal.forget_answers(time.time() - _KEPT_SECONDS)
        return request

    def _enqueue(self, line: str, number: int, request: str, kind: str, work: Work) -> None:
        one = self._lines[line]
        if number < one.turn:
            self._finish(request, Failure(f"seq_id {number} was given up: it came after {self._gap:g} s", "user"))
            return
        one.waiting[number] = (request, kind, work)
        self._advance(line)

    def _advance(self, line: str) -> None:
        one = self._lines[line]
        while one.turn in one.waiting:
            self._start(line, *one.waiting.pop(one.turn))
            one.turn += 1
        if one.timer is not None:
            one.timer.cancel()
            one.timer = None
        if one.waiting:
            one.timer = threading.Timer(self._gap, self._give_up, (line, one.turn))
            one.timer.daemon = True
            one.timer.start()

    def _give_up(self, line: str, turn: int) -> None:
        """Fail what waits behind a number that did not come: what it was is not known, so nothing may build on it."""
        with self._lock:
            one = self._lines.get(line)
            if one is None or one.turn != turn or not one.waiting:
                return
            why = f"seq_id {turn} of {line} did not arrive within {self._gap:g} s, so nothing sent after it was run"
            last = max(one.waiting)
            for request, _, _ in one.waiting.values():
                self._finish(request, Failure(why, "user"))
            one.waiting.clear()
            one.turn, one.timer = last + 1, None

    def _start(self, line: str, request: str, kind: str, work: Work) -> None:
        self._worker.submit(self._work, line, request, kind, work)

    def _work(self, line: str, request: str, kind: str, work: Work) -> None:
        began, ended = time.perf_counter(), self._gone.get(line)
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
            words = f"it ran, but its answer could not be kept ({error}): go on from the last checkpoint"
            self._pending[request][1].set_result(Failure(words, "server"))
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

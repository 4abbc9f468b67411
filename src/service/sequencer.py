"""Operations in the order of their sequence numbers, each once, whatever the network does to their arrival."""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, final

from ..errors import PullbackError, ServiceError

__all__ = ["Failure", "Sequencer"]

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Failure:
    """What a client reads of a failed operation.

    Attributes:
        text: the error's.
        category: whose fault it is, ``user`` or ``server``.
    """

    text: str
    category: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Say whose fault an error is: what was refused is the user's."""
        if isinstance(error, (PullbackError, ValueError, TypeError)):
            return cls(str(error), "user")
        return cls(f"{type(error).__name__}: {error}", "server")


@dataclass
class _Line:
    """One model's operations: the next number whose turn it is, those that came early, and all that were accepted."""

    turn: int
    waiting: dict[int, tuple[str, Callable[[], Any]]] = field(default_factory=dict)
    accepted: dict[int, tuple[str, str]] = field(default_factory=dict)


@final
class Sequencer:
    """Accepts numbered operations at once and runs them one after another in one worker thread.

    A number that comes again with the same payload gets the first answer; with another payload it is refused. A failed
    operation has had its turn: those after it run.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pullback-worker")
        self._lines: dict[str, _Line] = {}
        self._futures: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()
        self._count = itertools.count(1)

    def open(self, line: str, first: int = 1) -> None:
        """Begin a line of operations."""
        with self._lock:
            self._lines[line] = _Line(first)

    def submit(self, line: str, number: int, payload: bytes, work: Callable[[], Any]) -> str:
        """Accept an operation; return its request id.

        Raises:
            ServiceError: no such line, or the number was used for another payload.
        """
        digest = hashlib.sha256(payload).hexdigest()
        with self._lock:
            if line not in self._lines:
                raise ServiceError(
                    f"unknown model {line!r}; it was never created here, or the server was restarted since"
                )
            one = self._lines[line]
            if number in one.accepted:
                request, before = one.accepted[number]
                if before != digest:
                    raise ServiceError(f"seq_id {number} of {line} was used for another request; numbers go up by one")
                return request
            request = self._new()
            one.accepted[number] = (request, digest)
            one.waiting[number] = (request, work)
            while one.turn in one.waiting:
                self._start(*one.waiting.pop(one.turn))
                one.turn += 1
            return request

    def submit_unordered(self, work: Callable[[], Any]) -> str:
        """Accept an operation that no number orders (creating a model, sampling)."""
        with self._lock:
            request = self._new()
            self._start(request, work)
            return request

    def result(self, request: str) -> Future[Any]:
        """Return the future of an accepted operation; it resolves to the answer or a `Failure`, never raises.

        Raises:
            ServiceError: no such request.
        """
        with self._lock:
            if request not in self._futures:
                raise ServiceError(
                    f"unknown request {request!r}; the server may have been restarted since it was accepted"
                )
            return self._futures[request]

    def close(self) -> None:
        """Finish what runs and drop what waits."""
        self._worker.shutdown(cancel_futures=True)

    def _new(self) -> str:
        request = f"req-{next(self._count)}-{secrets.token_hex(4)}"
        self._futures[request] = Future()
        return request

    def _start(self, request: str, work: Callable[[], Any]) -> None:
        future = self._futures[request]
        self._worker.submit(lambda: future.set_result(_guarded(work)))


def _guarded(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        failure = Failure.of(error)
        if failure.category == "server":
            _logger.exception("an operation failed")
        return failure

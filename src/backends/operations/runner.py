"""Operations become futures, in order; failures are remembered until somebody has retrieved them."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar, cast, final

from ...errors import ClosedError
from ..engine import Call, Engine
from .accumulation import Accumulation, unretrieved
from .futures import Answer, Failure, FinishedFuture, Future, Outcome, Pending
from .lock import OperationLock

__all__ = ["Operations", "sized"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@final
class Operations:
    """Runs the operations of one backend, one at a time, whichever threads they come from.

    Attributes:
        accumulation: is told of gradient operations.
        closed: nothing runs any more.
        lock: held while an operation runs.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._outcomes: list[Outcome] = []
        self.lock = OperationLock()  # e.g. scoring the reference switches the adapter off for a while
        self.accumulation = Accumulation()
        self.closed = False

    def run(self, call: Call, work: Callable[[], Answer[T]], gradient: bool = False) -> Future[T]:
        """Run an operation; its result, or its error, comes through the future.

        Raises:
            BackendError: a loss, inside another operation, asks for one that changes something.
            ClosedError: the backend has been closed.
        """
        with self.lock.operation(call.operation):
            return self._run(call, work, gradient)

    def require_open(self, operation: str) -> None:
        """Check that the backend has not been closed.

        Raises:
            ClosedError: it has.
        """
        if self.closed:
            raise ClosedError(f"{operation} on a backend that has been closed")

    def _run(self, call: Call, work: Callable[[], Answer[T]], gradient: bool) -> Future[T]:
        self.require_open(call.operation)
        try:
            with self._engine.operation(call):
                answer = work()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # or they would keep graphs alive for as long as the error
            failure = Failure(error)
            self._remember(failure, gradient)
            return FinishedFuture(failure=failure, operation=call.operation)
        except BaseException as error:  # cancelled (Ctrl-C): it goes up at once, but the accumulation lacks a batch
            if gradient:
                self.accumulation.outcomes.append(Failure(error))
            raise
        if not isinstance(answer, Pending):
            return FinishedFuture(answer, operation=call.operation)
        future = answer.future(call.operation)
        self._remember(future, gradient)
        if gradient:
            self.accumulation.follow(future)
        return cast(Future[T], future)

    def close(self, timeout: float | None = None) -> None:
        """Refuse what follows; wait for what is under way, and give back what the engine holds.

        Args:
            timeout: seconds for all of it; None = as long as each operation may take.

        Raises:
            UnretrievedFailureError: an operation failed and nobody retrieved its error.
            TimeoutError: an operation is still under way; what the engine holds is given back.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self.lock.operation("close"):
            if self.closed:
                return
            self.closed = True
            try:
                self._require_retrieved(until)
            except Exception:
                self._close_quietly(_left(until))
                raise
            self._close_engine(_left(until))

    def abandon(self, timeout: float | None = None) -> None:
        """Close without asking for failures: an error that is on its way out matters more."""
        if not self.closed:
            self.closed = True
            self._close_quietly(timeout)

    def _close_quietly(self, timeout: float | None) -> None:
        """Give back what the engine holds; an error of that is logged, as another one is on its way out."""
        try:
            self._close_engine(timeout)
        except Exception as error:
            _logger.warning("what the backend holds could not be given back: %s", error)

    def _close_engine(self, timeout: float | None) -> None:
        if timeout is None:
            self._engine.close()  # engines need not know of a time limit
        else:
            self._engine.close(timeout)

    def _require_retrieved(self, until: float | None) -> None:
        lost = [
            o for o in self._outcomes if not o.retrieved and o.settle(_sooner(o.deadline, _left(until))) is not None
        ]
        failures = [error for o in lost if (error := o.settle()) is not None]
        for outcome in lost:
            outcome.retrieved = True
        if failures:
            raise unretrieved(failures) from failures[0]

    def _remember(self, outcome: Outcome, gradient: bool) -> None:
        self._outcomes = [*(o for o in self._outcomes if not o.retrieved), outcome]
        if gradient:
            failed = [o for o in self.accumulation.outcomes if not (isinstance(o, Failure) and o.retrieved)]
            self.accumulation.outcomes = [*failed, outcome]


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


def _sooner(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)


def sized(data: object) -> int:
    """Return how many datums there are, 0 for what is no sequence."""
    return len(data) if isinstance(data, Sequence) else 0

"""Futures of operations that run elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar, final

from ....errors import PullbackError, RemoteError
from ...operations.futures import Pending, State
from ..sdk.error_mapping import final_answer, remote_error
from .liveness import Liveness, arrived

__all__ = ["RemoteFuture", "Sent", "all_arrived"]

T = TypeVar("T")
U = TypeVar("U")
_logger = logging.getLogger(__name__)


@final
class Sent(Pending[T]):
    """What has been sent, and how its answers become a result.

    Args:
        requests: the SDK's futures.
        read: makes the result of their answers.
        before: the SDK's futures of earlier operations, which the service runs first.
        deadline: seconds that a result waits; None = for ever.
        liveness: of the service.
        parts: requests on the wire, of which each may fail alone; the SDK tells of the first failure only.
    """

    def __init__(
        self,
        requests: Sequence[Any],
        read: Callable[[list[Any]], T],
        before: Sequence[Sequence[Any]] = (),
        deadline: float | None = None,
        liveness: Liveness | None = None,
        parts: int = 1,
    ) -> None:
        self.requests, self.read, self.before, self.deadline = requests, read, before, deadline
        self.liveness, self.parts = liveness or Liveness(), parts

    def map(self, convert: Callable[[T], U]) -> Sent[U]:
        def read(answers: list[Any]) -> U:
            return convert(self.read(answers))

        return Sent(self.requests, read, self.before, self.deadline, self.liveness, self.parts)

    def future(self, operation: str) -> RemoteFuture[T]:
        return RemoteFuture(self, operation)


@final
class RemoteFuture(Generic[T]):
    """The result of a remote operation, fetched and converted once.

    Args:
        sent: what has been sent.
        operation: for messages.

    Attributes:
        retrieved: somebody has seen how it ended.
        deadline: seconds that `result` waits where it is not told; None = for ever.
    """

    def __init__(self, sent: Sent[T], operation: str) -> None:
        self._sent, self._operation = sent, operation
        self._before = [one for one in sent.before if not all_arrived(one)]
        self.deadline = sent.deadline
        self._value: T | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._began = time.monotonic()
        self.retrieved = False

    @property
    def arrived(self) -> bool:
        """Whether all answers are here, retrieved or not."""
        return self._ended or all_arrived(self._sent.requests)

    @property
    def state(self) -> State:
        """What has been learned of the operation; only a final answer to the whole of it says that it has failed."""
        if not self._ended:
            return "pending"
        if self._error is None:
            return "accepted"
        return "failed" if self._sent.parts == 1 and final_answer(self._error) else "unknown"

    @property
    def phase(self) -> str:
        """Where the operation is: ``queued``, ``running``, ``reading`` or ``done``."""
        if self._ended:
            return "done"
        if self.arrived:
            return "reading"
        self._before = [one for one in self._before if not all_arrived(one)]
        return "queued" if self._before else "running"

    def settle(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, without counting as retrieving it.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds; ask again.
        """
        if not self._ended:
            try:
                self._value = self._sent.read(self._answers(timeout))
            except TimeoutError:
                raise
            except Exception as error:
                self._error = self._own(error)
            self._ended = True
            self._before = []
        return self._error

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the operation's error.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds (default: the backend's); ask again.
            RemoteError: the service failed it.
        """
        error = self.settle(self.deadline if timeout is None else timeout)
        self.retrieved = True
        if error is not None:
            raise error
        return self._value  # type: ignore[return-value]  # None is the value of operations that return nothing

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as retrieving it."""
        error = self.settle(self.deadline if timeout is None else timeout)
        self.retrieved = True
        return error

    def done(self) -> bool:
        """Whether the operation has ended."""
        return self.arrived

    def __await__(self) -> Generator[Any, None, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        """Wait without a thread, so that a cancelled `await` ends at once and leaves nothing behind that waits on."""
        try:
            async with asyncio.timeout(self.deadline):
                for request in self._sent.requests:
                    await _arrival(request)
        except TimeoutError as error:
            raise await asyncio.to_thread(self._late, self.deadline) from error
        return await asyncio.to_thread(self.result)

    def __del__(self) -> None:
        if self._error is not None and not self.retrieved:
            _logger.error("%s failed and nobody retrieved its error: %s", self._operation, self._error)

    def _answers(self, timeout: float | None) -> list[Any]:
        until = None if timeout is None else time.monotonic() + timeout
        try:
            return [self._sent.liveness.wait(one, until) for one in self._sent.requests]
        except TimeoutError as error:
            if self.arrived:  # it is the operation that failed so
                raise remote_error(error, self._operation) from error
            raise self._late(timeout) from error
        except Exception as error:
            raise remote_error(error, self._operation) from error

    def _late(self, timeout: float | None) -> TimeoutError:
        """Say that there is no answer yet, and whether the service is still there."""
        sent, silent = (
            f"{self._operation} was sent {time.monotonic() - self._began:.1f} s ago",
            self._sent.liveness.silence(),
        )
        if silent:
            return TimeoutError(
                f"no answer from {self._sent.liveness.url} for {silent:.1f} s: {sent}, and it is not known whether it took "
                "effect; ask this future again when the service is back, or go on from the last checkpoint"
            )
        ahead = f" behind {len(self._before)} operation(s)" if self.phase == "queued" else ""
        waited = "" if timeout is None else f" (waited {timeout:g} s)"
        return TimeoutError(
            f"{sent} and is {self.phase}{ahead} at the service{waited}; it has not failed: ask this future again"
        )

    def _own(self, error: Exception) -> BaseException:
        """Answers are read by code of ours: what fails there, if it is none of our own errors, is a malformed answer."""
        if isinstance(error, PullbackError):
            return error
        unreadable = RemoteError(
            f"{self._operation}: the service's answer could not be read: {type(error).__name__}: {error}", "unknown"
        )
        unreadable.__cause__ = error
        return unreadable


def all_arrived(requests: Sequence[Any]) -> bool:
    """Whether all of an SDK's futures have their answers."""
    return all(arrived(one) for one in requests)


async def _arrival(request: Any) -> None:
    """Wait for the answer to one request, and touch nothing of it: what is cancelled is this wait alone."""
    inner = request.future() if hasattr(request, "future") else request
    if not hasattr(inner, "add_done_callback"):
        await asyncio.to_thread(request.result)
        return
    loop, here = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed since
            loop.call_soon_threadsafe(here.set)

    inner.add_done_callback(wake)
    await here.wait()

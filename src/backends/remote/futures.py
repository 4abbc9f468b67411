"""Futures of operations that run elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

from ...errors import PullbackError, RemoteError
from .error_mapping import remote_error

__all__ = ["Pending", "RemoteFuture"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Pending(Generic[T]):
    """What has been sent, and how its answers become a result.

    Args:
        sent: the SDK's futures.
        read: from their answers.
    """

    sent: Sequence[Any]
    read: Callable[[list[Any]], T]


@final
class RemoteFuture(Generic[T]):
    """The result of a remote operation, fetched and converted once.

    Args:
        pending: what has been sent.
        operation: for messages.
        before: operations that the service runs first.
        deadline: seconds that `result` waits where it is not told; None = for ever.

    Attributes:
        read: somebody has seen how it ended.
    """

    def __init__(
        self,
        pending: Pending[T],
        operation: str,
        before: Sequence[RemoteFuture[Any]] = (),
        deadline: float | None = None,
    ) -> None:
        self._pending, self._operation = pending, operation
        self._before = [future for future in before if not future.arrived]
        self.deadline = deadline
        self._value: T | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._began = time.monotonic()
        self.read = False

    @classmethod
    def failed(cls, error: Exception, operation: str) -> RemoteFuture[T]:
        """Return the future of an operation that was refused before it was sent."""
        future: RemoteFuture[Any] = cls(Pending((), lambda _: None), operation)  # type: ignore[arg-type, return-value]  # never read
        future._error, future._ended = error, True
        return future

    @property
    def arrived(self) -> bool:
        """Whether all answers are here, read or not."""
        return self._ended or all(_done(one) for one in self._pending.sent)

    @property
    def phase(self) -> str:
        """Where the operation is: ``queued``, ``running``, ``reading`` or ``done``."""
        if self._ended:
            return "done"
        if self.arrived:
            return "reading"
        self._before = [future for future in self._before if not future.arrived]
        return "queued" if self._before else "running"

    def settle(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, without counting as reading it.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds; ask again.
        """
        if not self._ended:
            try:
                self._value = self._pending.read(self._answers(timeout))
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
        self.read = True
        if error is not None:
            raise error
        return self._value  # type: ignore[return-value]  # None is the value of operations that return nothing

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as reading it."""
        error = self.settle(self.deadline if timeout is None else timeout)
        self.read = True
        return error

    def done(self) -> bool:
        """Whether the operation has ended."""
        return self.arrived

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.to_thread(self.result).__await__()

    def __del__(self) -> None:
        if self._error is not None and not self.read:
            _logger.error("%s failed and nobody read its future: %s", self._operation, self._error)

    def _answers(self, timeout: float | None) -> list[Any]:
        until = None if timeout is None else time.monotonic() + timeout
        try:
            return [
                one.result(timeout=None if until is None else max(0.0, until - time.monotonic()))
                for one in self._pending.sent
            ]
        except TimeoutError as error:
            ahead = f" behind {len(self._before)} operation(s)" if self.phase == "queued" else ""
            raise TimeoutError(
                f"{self._operation} was sent {time.monotonic() - self._began:.1f} s ago and is {self.phase}{ahead} at the "
                f"service (waited {timeout:g} s); it has not failed: ask this future again"
            ) from error
        except Exception as error:
            raise remote_error(error, self._operation) from error

    def _own(self, error: Exception) -> BaseException:
        """Answers are read by code of ours: what fails there, if it is none of our own errors, is a malformed answer."""
        if isinstance(error, PullbackError):
            return error
        words = f"{self._operation}: the service's answer could not be read: {type(error).__name__}: {error}"
        found = RemoteError(words, "unknown")
        found.__cause__ = error
        return found


def _done(sent: Any) -> bool:
    """Whether an SDK's future has its answer; one that cannot say has not."""
    inner = sent.future() if hasattr(sent, "future") else sent
    return bool(inner.done()) if hasattr(inner, "done") else False

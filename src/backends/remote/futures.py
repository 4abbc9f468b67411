"""Futures of operations that run elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar, final

from ...errors import PullbackError, RemoteError

__all__ = ["RemoteFuture"]

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@final
class RemoteFuture(Generic[T]):
    """The result of a remote operation, fetched and converted once.

    Args:
        fetch: waits for the SDK's result (given a timeout) and converts it.
        operation: for messages.
    """

    def __init__(self, fetch: Callable[[float | None], T], operation: str) -> None:
        self._fetch = fetch
        self._operation = operation
        self._value: T | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._sent = time.monotonic()
        self.read = False

    @classmethod
    def failed(cls, error: Exception, operation: str) -> RemoteFuture[T]:
        """Return the future of an operation that was refused before it was sent."""

        def fetch(_: float | None) -> T:
            raise error

        future = cls(fetch, operation)
        future.settle()
        return future

    def settle(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; return the error, without counting as reading it."""
        if not self._ended:
            try:
                self._value = self._fetch(timeout)
            except TimeoutError as error:
                raise TimeoutError(
                    f"{self._operation} was sent {time.monotonic() - self._sent:.1f} s ago and is queued or running at the "
                    f"service; it has not failed: ask this future again (waited {timeout} s)"
                ) from error
            except PullbackError as error:
                self._error = error
            except Exception as error:
                self._error = _remote(error, self._operation)
            self._ended = True
        return self._error

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the operation's error.

        Raises:
            TimeoutError: it has not ended after ``timeout`` seconds; ask again.
            RemoteError: the service failed it.
        """
        error = self.settle(timeout)
        self.read = True
        if error is not None:
            raise error
        return self._value  # type: ignore[return-value]  # None is the value of operations that return nothing

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as reading it."""
        error = self.settle(timeout)
        self.read = True
        return error

    def done(self) -> bool:
        """Whether the result has been fetched."""
        return self._ended

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.to_thread(self.result).__await__()

    def __del__(self) -> None:
        if self._error is not None and not self.read:
            _logger.error("%s failed and nobody read its future: %s", self._operation, self._error)


def _remote(error: Exception, operation: str) -> Exception:
    """Name the operation that an SDK's error belongs to; errors of this process stay what they are."""
    if not type(error).__module__.startswith(("tinker", "fireworks", "httpx")):
        return error
    found = RemoteError(f"{operation} failed at the service: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found

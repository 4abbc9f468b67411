"""Futures: a result or an error that somebody must read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeVar, final

__all__ = ["FinishedFuture", "Future"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
_logger = logging.getLogger(__name__)


class Future(Protocol[T_co]):
    """The handle that every operation returns."""

    def result(self, timeout: float | None = None) -> T_co:
        """Return the result, or raise the operation's error."""
        ...

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as reading it."""
        ...

    def done(self) -> bool:
        """True if the operation has ended."""
        ...

    def __await__(self) -> Generator[Any, None, T_co]: ...


@final
class FinishedFuture(Generic[T]):
    """The future of an operation that has already run, in the caller's thread.

    An error that is never read is logged when the future dies; `on_read` lets the backend know that it was read.
    """

    def __init__(
        self,
        value: T | None = None,
        error: BaseException | None = None,
        on_read: Callable[[], None] | None = None,
        operation: str = "operation",
    ) -> None:
        self._value = value
        self._error = error
        self._on_read = on_read
        self._operation = operation
        self._unread = error is not None

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the operation's error (``timeout`` is never needed)."""
        if self._error is not None:
            self._mark_read()
            raise self._error
        return self._value  # type: ignore[return-value]  # None is the value of operations that return nothing

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the operation's error, or None. Counts as reading it."""
        self._mark_read()
        return self._error

    def done(self) -> bool:
        """Always True."""
        return True

    def __await__(self) -> Generator[Any, None, T]:
        return self.result()
        yield  # a function with a yield is a generator, which is what `await` wants

    def _mark_read(self) -> None:
        if self._unread and self._on_read is not None:
            self._on_read()
        self._unread = False

    def __del__(self) -> None:
        if self._unread:
            _logger.error("%s failed and nobody read its future: %s", self._operation, self._error)

"""Operations become futures; failures are kept until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, final

from ...errors import ClosedError, UnreadFailureError
from ..futures import FinishedFuture
from .window import Window

__all__ = ["Operations"]

T = TypeVar("T")


@final
class Operations:
    """Runs operations in the caller's thread. A failed gradient operation spoils the window until it is read."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._unread: list[BaseException] = []
        self.closed = False

    def run(self, operation: str, work: Callable[[], T], gradient: bool = False) -> FinishedFuture[T]:
        """Run ``work`` and return its finished future.

        Raises:
            ClosedError: the backend has been closed.
        """
        if self.closed:
            raise ClosedError(f"{operation} on a backend that has been closed")
        try:
            return FinishedFuture(work(), operation=operation)
        except Exception as error:
            failure = error
        except BaseException as error:  # cancelled (Ctrl-C): it goes up at once, but the window lacks a batch
            if gradient:
                self._window.failures.append(error)
            raise
        self._unread.append(failure)
        if gradient:
            self._window.failures.append(failure)
        return FinishedFuture(error=failure, on_read=lambda: self.read(failure), operation=operation)

    def read(self, failure: BaseException) -> None:
        """Note that somebody knows of this failure."""
        self._unread = [f for f in self._unread if f is not failure]
        self._window.failures = [f for f in self._window.failures if f is not failure]

    def forgive(self) -> None:
        """Count every failure as read."""
        self._unread = []

    def close(self) -> None:
        """Refuse further operations.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        self.closed = True
        unread, self._unread = self._unread, []
        if unread:
            raise UnreadFailureError(
                f"{len(unread)} operation(s) failed and their futures were never read; the first: "
                f"{type(unread[0]).__name__}: {unread[0]}"
            ) from unread[0]

"""Operations become futures; failures are kept until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, final

from ..errors import ClosedError, PrecedingOperationFailed, UnreadFailureError
from .futures import FinishedFuture

__all__ = ["Operations", "Spoilable", "never_read", "require_unspoiled", "spoiled"]

T = TypeVar("T")


class Spoilable(Protocol):
    """A gradient window that knows of operations that should have added to it and did not.

    Attributes:
        failures: gradient operations that failed and whose error nobody has read.
    """

    failures: list[BaseException]


def require_unspoiled(window: Spoilable) -> None:
    """Raise if a gradient operation failed and its error was not read.

    Raises:
        PrecedingOperationFailed: the window lacks a batch.
    """
    if window.failures:
        raise spoiled(window.failures[0]) from window.failures[0]


def spoiled(cause: BaseException) -> PrecedingOperationFailed:
    """Word the refusal of a window that lacks a batch."""
    return PrecedingOperationFailed(
        f"an earlier gradient operation failed ({type(cause).__name__}: {cause}) and its error has not been read, "
        "so this window lacks a batch; read that operation's .result(), or call discard_gradients()"
    )


def never_read(failures: Sequence[BaseException]) -> UnreadFailureError:
    """Word the failures that nobody has read."""
    first = failures[0]
    return UnreadFailureError(
        f"{len(failures)} operation(s) failed and their futures were never read; the first: "
        f"{type(first).__name__}: {first}"
    )


@final
class Operations:
    """Runs operations in the caller's thread. A failed gradient operation spoils the window until it is read."""

    def __init__(self, window: Spoilable) -> None:
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
        failures, self._unread = self._unread, []
        if failures:
            raise never_read(failures) from failures[0]

"""Operations at a service become futures, which are kept until somebody has read how they ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, final

from ...errors import ClosedError, RemoteError
from ..operations import never_read
from .accumulator import RemoteWindow
from .error_mapping import at_service
from .futures import Pending, RemoteFuture

__all__ = ["RemoteOperations"]

T = TypeVar("T")


@final
class RemoteOperations:
    """Sends the operations of one backend.

    Args:
        window: is told of gradient operations, and of those whose fate is unknown.
        timeout: seconds that a result waits where it is not told; None = for ever.

    Attributes:
        closed: nothing is sent any more.
    """

    def __init__(self, window: RemoteWindow, timeout: float | None) -> None:
        self._window, self._timeout = window, timeout
        self._futures: list[RemoteFuture[Any]] = []
        self.closed = False

    def run(self, operation: str, send: Callable[[], Pending[T]], gradient: bool = False) -> RemoteFuture[T]:
        """Send an operation; what is refused here comes through its future, as from everywhere else.

        Raises:
            ClosedError: the backend has been closed.
        """
        if self.closed:
            raise ClosedError(f"{operation} on a backend that has been closed")
        try:
            with at_service(operation):
                future = RemoteFuture(send(), operation, self._futures, self._timeout)
        except Exception as error:
            future = RemoteFuture.failed(error, operation)
        self._futures = [*(f for f in self._futures if not f.read), future]
        if gradient:
            self._window.futures.append(future)  # type: ignore[arg-type]  # a gradient operation's T is its output
        return future

    def wait(self, sent: Any, operation: str, changes: bool = True) -> Any:
        """Wait, inside a call, for an operation; one that may have changed the window without our knowing tears it."""
        future = RemoteFuture(Pending([sent], lambda answers: answers[0]), operation, self._futures, self._timeout)
        try:
            return future.result()
        except (TimeoutError, RemoteError) as error:
            if changes:
                self._window.tear(error)
            raise

    def close(self) -> None:
        """Wait for what is under way, and refuse further operations.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        self.closed = True
        errors = [f.exception() for f in self._futures if f.settle(self._timeout) is not None and not f.read]
        failures = [error for error in errors if error is not None]
        if failures:
            raise never_read(failures) from failures[0]

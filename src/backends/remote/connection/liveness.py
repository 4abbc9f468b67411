"""Whether a service still answers; that is asked only while something is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any, Final, final

from ....errors import RemoteError
from .probe import alive

__all__ = ["Liveness", "arrived"]

_EVERY: Final = 2.0  # seconds between two questions
_QUESTION: Final = 2.0  # seconds that an answer to one may take
_DEAD: Final = 10.0  # seconds of unanswered questions after which a backend that is closed waits no longer
_ENDING: Final = 60.0  # seconds that a session's end may take while the service answers: an SDK can miss the end of it


@final
class Liveness:
    """One service, and when it was last heard.

    Args:
        url: its address; None: not known, so that nobody can tell.

    Attributes:
        closing: nothing more is sent: what a silent service cannot answer is not waited for.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url, self.closing = url, False
        self._heard = time.monotonic()
        self._asked: float | None = None  # when the first of the questions was put that it has not answered since

    def heard(self) -> None:
        """Note that it has answered."""
        self._heard, self._asked = time.monotonic(), None

    def silence(self) -> float:
        """Ask it something; return for how many seconds it has been silent, 0.0 if it answers or nobody can tell."""
        asked = time.monotonic()
        if self.url is None or alive(self.url, _QUESTION):
            self.heard()
            return 0.0
        if self._asked is None:
            self._asked = asked
        return time.monotonic() - self._heard

    def gone(self) -> bool:
        """Ask it something; return whether it has left all questions unanswered for a while; idle seconds are none."""
        self.silence()
        return self._asked is not None and time.monotonic() - self._asked >= _DEAD

    def wait(self, request: Any, until: float | None) -> Any:
        """Return the answer to an SDK's request, or raise its error.

        Args:
            request: future of an SDK.
            until: the moment (monotonic seconds) after which nobody waits; None = for ever, while the service answers or
                the backend is not being closed.

        Raises:
            TimeoutError: there is no answer yet.
        """
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            if self.closing:
                left = _EVERY if left is None else min(left, _EVERY)
            try:
                answer = request.result(timeout=left)
            except TimeoutError:
                over = until is not None and time.monotonic() >= until
                if over or arrived(request) or self.gone():
                    raise
            else:
                self.heard()
                return answer

    def end(self, work: Callable[[], object], timeout: float | None) -> None:
        """End the session by ``work``, in a thread that nobody has to wait for if the service is silent.

        Raises:
            RemoteError: it was not ended within ``timeout`` seconds (None: a minute, or the service was silent for a while).
        """
        self.closing = True
        limit = _ENDING if timeout is None else timeout
        try:
            self.wait(_in_thread(work), time.monotonic() + limit)
        except TimeoutError as error:
            silent = self.silence()
            words = (
                f"no answer from {self.url} for {silent:.1f} s; the session was not ended there:"
                if silent
                else f"the service answers, but the SDK has not closed its client in {limit:.3g} s; if its session goes on,"
            )
            raise RemoteError(f"close: {words} the service ends it when it has missed it for long enough") from error

    @contextmanager
    def explaining(self, operation: str, timeout: float | None) -> Iterator[None]:
        """Put a wait that was too long, inside a call, into words."""
        try:
            yield
        except TimeoutError as error:
            if str(error):
                raise
            silent = self.silence()
            words = (
                f"no answer from {self.url} for {silent:.1f} s" if silent else "the service answers, but not yet this"
            )
            raise TimeoutError(f"{operation} was waited for {timeout or 0:g} s: {words}; call it again") from error


def arrived(request: Any) -> bool:
    """Whether an SDK's future has its answer; one that cannot say has not."""
    inner = request.future() if hasattr(request, "future") else request
    return bool(inner.done()) if hasattr(inner, "done") else False


def _in_thread(work: Callable[[], object]) -> Future[Any]:
    """Run something in a thread of its own, which nobody has to wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="pullback-close", daemon=True).start()
    return future

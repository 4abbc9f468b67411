"""One operation of a backend at a time, whichever threads ask; while a loss runs, others may score."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, final

from ...errors import BackendError

__all__ = ["OperationLock", "running_loss"]

_HARMLESS: Final = ("forward", "reference", "sample")


@final
@dataclass(eq=False)
class _Running:
    """An operation under way.

    Attributes:
        in_loss: it waits for its loss, which is the caller's code.
        older: threads that were there before the loss began; others were started meanwhile, most likely by it.
    """

    thread: threading.Thread = field(default_factory=threading.current_thread)
    in_loss: bool = False
    older: frozenset[threading.Thread] = frozenset()

    def asked_by(self, thread: threading.Thread) -> bool:
        """Whether it is this operation, or its loss, that waits for what the thread does."""
        return thread is self.thread or (self.in_loss and thread not in self.older)


@final
class OperationLock:
    """A lock that a loss lends to operations that change nothing, until it returns.

    A loss may score the same model, in its own thread or in one that it waits for: neither can wait for the end of the
    operation that evaluates the loss. What changes the model or its gradients waits for that end, or is refused where the loss
    itself asks for it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: list[_Running] = []  # each within the loss of the one before it
        self._waiting: list[_Running] = []  # in the order in which they came

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Wait for the others, then run one.

        Raises:
            BackendError: the loss of another operation, which waits for it, asks for one that changes something.
        """
        own = _Running()
        with self._changed:
            self._begin(own, name)
        token = _current.set((self, own))
        try:
            yield
        finally:
            _current.reset(token)
            with self._changed:
                self._running.remove(own)
                self._changed.notify_all()

    def _begin(self, own: _Running, name: str) -> None:
        self._waiting.append(own)
        try:
            self._changed.wait_for(lambda: self._may_begin(own, name))
            self._running.append(own)
        finally:
            self._waiting.remove(own)
            self._changed.notify_all()

    def _may_begin(self, own: _Running, name: str) -> bool:
        if name not in _HARMLESS:
            self._require_outermost(name, own.thread)
        if not self._running:
            return self._waiting[0] is own
        return name in _HARMLESS and (self._running[-1].in_loss or self._running[-1].thread is own.thread)

    def _require_outermost(self, name: str, thread: threading.Thread) -> None:
        if any(one.asked_by(thread) for one in self._running):
            raise BackendError(f"{name} inside another operation of the same backend: a loss may score, but not train")

    @contextmanager
    def lent(self, own: _Running) -> Iterator[None]:
        """Let others score while an operation is in its loss, and wait for them at its end."""
        before = own.in_loss, own.older
        with self._changed:
            own.in_loss, own.older = True, frozenset(threading.enumerate())
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._changed.wait_for(lambda: self._running[-1] is own)
                own.in_loss, own.older = before


_current: ContextVar[tuple[OperationLock, _Running] | None] = ContextVar("_current", default=None)


@contextmanager
def running_loss() -> Iterator[None]:
    """Mark the evaluation of a loss: the operation that runs here, if any, waits for the caller's code."""
    current = _current.get()
    if current is None:
        yield
        return
    lock, own = current
    with lock.lent(own):
        yield

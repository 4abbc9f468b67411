"""What a tool that only looks at a backend needs: operations that leave no trace, and the cotangents that went backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .base import Backend
from .operations.accumulation import Accumulation

__all__ = ["has_accumulated", "last_cotangents", "preserved", "restored_after_failure"]


@contextmanager
def preserved(backend: Backend, *, weights: bool = True) -> Iterator[None]:
    """Let the block call a backend and leave it as it was: weights, optimizer, accumulated gradients, counters.

    In the block nothing has accumulated. Forwards that were retained before do not outlive an optimizer step in it.

    Args:
        backend: whose state is kept.
        weights: steps may be made in the block; the copies take as much memory as the trained weights and their optimizer.

    Raises:
        UnsupportedError: the backend's state lies elsewhere.
    """
    back = _set_aside(backend, weights)
    try:
        yield
    finally:
        back()


@contextmanager
def restored_after_failure(backend: Backend) -> Iterator[None]:
    """Let the block change a backend in which nothing has accumulated; if it raises, the backend is as it was before.

    If it does not, what had accumulated is forgotten, as by ``discard_gradients``.

    Args:
        backend: whose state comes back; until then a copy of its trained weights and their optimizer is kept.

    Raises:
        UnsupportedError: the backend's state lies elsewhere.
    """
    before = backend._operations.accumulation
    back = _set_aside(backend, weights=True)
    try:
        yield
    except BaseException:
        back()
        raise
    before.retrieve_failures()


def _set_aside(backend: Backend, weights: bool) -> Callable[[], None]:
    """Begin anew with what accumulates; return what brings the state of this moment back."""
    operations = backend._operations
    with operations.lock.operation("preserved"):
        restore, before = backend._engine.snapshot(weights), operations.accumulation
        operations.accumulation = Accumulation(before.ledger.emptied())

    def back() -> None:
        with operations.lock.operation("preserved"):
            restore()
            operations.accumulation = before

    return back


def last_cotangents(backend: Backend) -> Mapping[int, Tensor] | None:
    """Return dL/dlogprob of the last gradient call, by datum, divided by the call's own count.

    None where a service computed them, or nothing has accumulated.
    """
    last = backend._operations.accumulation.last
    if last is None or last.cotangents is None:
        return None
    return {i: c.detach().cpu() / (last.count or 1.0) for i, c in last.cotangents.items()}


def has_accumulated(backend: Backend) -> bool:
    """Return whether there are gradients that no step has used."""
    return bool(backend._operations.accumulation.ledger.entries)

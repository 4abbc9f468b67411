"""What a tool that only looks at a backend needs: operations that leave no trace, and the cotangents that went backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .accumulation import Accumulation
from .base import Backend

__all__ = ["has_accumulated", "last_cotangents", "preserved"]


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
    operations = backend._operations
    with operations.lock.operation("preserved"):
        restore, before = backend._engine.snapshot(weights), operations.accumulation
        operations.accumulation = Accumulation(before.ledger.emptied())
    try:
        yield
    finally:
        with operations.lock.operation("preserved"):
            restore()
            operations.accumulation = before


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

"""Sends operations to a service, in order, and knows which are still under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

from .futures import RemoteFuture, Sent, all_arrived
from .liveness import Liveness

__all__ = ["Dispatch"]

T = TypeVar("T")


@final
class Dispatch:
    """The operations that one backend has under way.

    Args:
        timeout: seconds that a result waits where it is not told; None = for ever.
        liveness: of the service.
    """

    def __init__(self, timeout: float | None, liveness: Liveness) -> None:
        self._timeout, self._liveness = timeout, liveness
        self._under_way: list[Sequence[Any]] = []

    @property
    def idle(self) -> bool:
        """Whether all answers are here."""
        return all(map(all_arrived, self._under_way))

    def sent(self, requests: Sequence[Any], read: Callable[[list[Any]], T], parts: int = 1) -> Sent[T]:
        """Return what an engine answers for requests that an SDK has sent; see `Sent`."""
        before = self._under_way = [one for one in self._under_way if not all_arrived(one)]
        self._under_way = [*before, requests]
        return Sent(requests, read, before, self._timeout, self._liveness, parts)

    def wait(self, request: Any, operation: str) -> Any:
        """Wait, inside a call, for a request."""
        future: RemoteFuture[Any] = self.sent([request], lambda answers: answers[0]).future(operation)
        return future.result()

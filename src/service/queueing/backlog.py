"""Accepted operations that have not ended, and how many of them are whose."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import final

from ...errors import BusyError
from ..durability.answers import Answer
from ..limits import Limits
from ..quotas import Quota

__all__ = ["Backlog"]


@final
class Backlog:
    """The futures of accepted operations; not safe to use from several threads.

    Args:
        limits: how many there may be.
    """

    def __init__(self, limits: Limits) -> None:
        ended = "one is free when one of them has ended: ask again later"
        self._quota = Quota("operations that wait or run", limits.queue, limits.queue_per_key, limits.shared, ended)
        most = max(1, int(min(limits.queue, limits.queue_per_key or limits.queue)) // 2)
        came = "they run when it comes, and fail when it does not in time: send it first"
        self._gaps = Quota("operations that wait for a missing number", None, min(limits.waiting, most), False, came)
        self._pending: dict[str, tuple[str, Future[Answer]]] = {}
        self._held, self._waiting = Counter[str](), Counter[str]()

    def __len__(self) -> int:
        return len(self._pending)

    def require_room(self, owner: str, *, early: bool, fills: bool) -> None:
        """Check that an owner may have one more operation.

        Args:
            owner: whose it is.
            early: it waits for a missing number.
            fills: it is the number that others wait for; it may have what is left free for other owners.

        Raises:
            BusyError: too many wait or run already.
        """
        refusal = self._quota.refusal(self._held[owner], len(self._pending), reserved=fills)
        if refusal is None and early:
            refusal = self._gaps.refusal(self._waiting[owner], 0)
        if refusal is not None:
            raise BusyError(refusal)

    def add(self, owner: str, request: str) -> None:
        """Add an operation."""
        self._pending[request] = (owner, Future())
        self._held[owner] += 1

    def waits(self, owner: str, change: int) -> None:
        """Note that so many more of an owner's operations wait for a missing number."""
        self._waiting += Counter({owner: change})

    def future(self, owner: str, request: str) -> Future[Answer] | None:
        """Return the future of an owner's operation; None if there is none that has not ended."""
        whose, future = self._pending.get(request, (None, None))
        return future if whose == owner else None

    def end(self, request: str, *, keep: bool = False) -> Future[Answer]:
        """Return an operation's future, and remove it unless it is to be kept."""
        owner, future = self._pending[request]
        if not keep:
            del self._pending[request]
            self._held -= Counter([owner])
        return future

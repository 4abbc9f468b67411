"""A cache that several owners share: which entry is evicted when there are too many."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Generic, TypeVar, final

__all__ = ["FairCache"]

T = TypeVar("T")


@final
class FairCache(Generic[T]):
    """Entries by name, each with an owner; the least recently used one of an owner is evicted.

    That is the owner who adds, where it has more than its quota. If all together have too many, it is the owner who has most:
    nobody loses an entry to another while it has no more than an equal share.

    Args:
        total: how many there may be.
        each: how many of one owner; None = no bound of its own.
    """

    def __init__(self, total: int, each: int | None = None) -> None:
        self._total, self._each = total, each
        self._entries: OrderedDict[str, tuple[str, T]] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """Return the names of all entries."""
        return list(self._entries)

    def get(self, name: str) -> T | None:
        """Return an entry, which counts as used; None: there is none."""
        if name not in self._entries:
            return None
        self._entries.move_to_end(name)
        return self._entries[name][1]

    def add(self, name: str, owner: str, value: T) -> None:
        """Add an entry, and evict one if there are too many."""
        self._entries[name] = (owner, value)
        self._entries.move_to_end(name)
        held = Counter(whose for whose, _ in self._entries.values())
        if self._each is not None and held[owner] > self._each:
            self._drop({owner})
        elif len(self._entries) > self._total:
            most = max(held.values())
            largest = {whose for whose, count in held.items() if count == most}
            self._drop({owner} if owner in largest and most > 1 else largest)

    def drop(self, name: str) -> None:
        """Remove an entry, if it is there."""
        self._entries.pop(name, None)

    def forget(self, prefix: str) -> None:
        """Remove all entries whose names begin so."""
        for name in [name for name in self._entries if name.startswith(prefix)]:
            del self._entries[name]

    def _drop(self, owners: set[str]) -> None:
        del self._entries[next(name for name, (whose, _) in self._entries.items() if whose in owners)]

"""Things in memory that go when there are too many, and whose go first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Generic, TypeVar, final

__all__ = ["Shares"]

T = TypeVar("T")


@final
class Shares(Generic[T]):
    """Things by name, each with an owner.

    An owner that has more than its quota loses the one that it used longest ago. If all have too many together, the one who has
    most does, so that nobody loses anything by what another adds while it has no more than an equal share.

    Args:
        total: how many there may be.
        each: how many of one owner; None = no bound of its own.
    """

    def __init__(self, total: int, each: int | None = None) -> None:
        self._total, self._each = total, each
        self._things: OrderedDict[str, tuple[str, T]] = OrderedDict()  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._things)

    def names(self) -> list[str]:
        """What all are called."""
        return list(self._things)

    def get(self, name: str) -> T | None:
        """Return a thing, which is used now."""
        if name not in self._things:
            return None
        self._things.move_to_end(name)
        return self._things[name][1]

    def add(self, name: str, owner: str, thing: T) -> None:
        """Add a thing, and let go of what is too many."""
        self._things[name] = (owner, thing)
        self._things.move_to_end(name)
        held = Counter(whose for whose, _ in self._things.values())
        if self._each is not None and held[owner] > self._each:
            self._drop({owner})
        elif len(self._things) > self._total:
            most = max(held.values())
            largest = {whose for whose, count in held.items() if count == most}
            self._drop({owner} if owner in largest and most > 1 else largest)

    def drop(self, name: str) -> None:
        """Let go of a thing, if it is there."""
        self._things.pop(name, None)

    def forget(self, prefix: str) -> None:
        """Let go of all whose names begin so."""
        for name in [name for name in self._things if name.startswith(prefix)]:
            del self._things[name]

    def _drop(self, owners: set[str]) -> None:
        del self._things[next(name for name, (whose, _) in self._things.items() if whose in owners)]

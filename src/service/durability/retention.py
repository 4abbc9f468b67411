"""What leaves the journal, so that it does not grow for ever: what is old or finished, and nothing refers to any more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final

from .database import ROWS_AT_ONCE, Database
from .journal import ANSWER_SECONDS, FORGET, Journal

__all__ = ["ROW_SECONDS", "bound_answers", "prune"]

ROW_SECONDS: Final = 7 * 24 * 3600.0  # how long a session that nobody has finished stays, and a model's operations
_OPERATIONS: Final = (
    "request IN (SELECT request FROM operations WHERE created < ? AND form IS NOT NULL "
    "AND line NOT LIKE '%:models' LIMIT ?)"
)
_SESSION_OPERATIONS: Final = (
    "request IN (SELECT request FROM operations WHERE line > ? || ':' AND line < ? || ';' AND created < ? "
    "AND form IS NOT NULL AND NOT EXISTS (SELECT 1 FROM models WHERE models.id = line) LIMIT ?)"
)
_MODELS: Final = (
    "id IN (SELECT id FROM models WHERE session = ? AND NOT EXISTS (SELECT 1 FROM checkpoints WHERE model = models.id) "
    "AND NOT EXISTS (SELECT 1 FROM operations WHERE line = models.id AND form IS NULL) LIMIT ?)"
)
_SAMPLERS: Final = "id IN (SELECT id FROM samplers WHERE id > ? || ':' AND id < ? || ';' LIMIT ?)"
_SESSIONS: Final = (
    "SELECT id FROM sessions WHERE id > ? AND coalesce(ended, created) < CASE WHEN ended IS NULL THEN ? ELSE ? END "
    "ORDER BY id LIMIT ?"
)
_SAVES: Final = (
    "EXISTS (SELECT 1 FROM operations WHERE line = saves.model AND number = saves.number AND form IS NOT NULL)"
)
_HELD: Final = "SELECT owner, sum(length(answer)) FROM operations WHERE answer IS NOT NULL GROUP BY owner"
_FORGET_BEYOND: Final = FORGET.format(
    "SELECT request FROM (SELECT request, sum(length(answer)) OVER (ORDER BY created DESC, request) AS with_newer "
    "FROM operations WHERE owner = ? AND answer IS NOT NULL) WHERE with_newer > ? LIMIT ?"
)


def prune(journal: Journal, now: float, alive: Collection[str]) -> int:
    """Throw away old answers, and delete rows that nothing refers to; return how many were deleted.

    A session stays while a model of it stays, a model while it has a checkpoint or an operation that has not ended.

    Args:
        journal: what leaves it.
        now: seconds of the epoch.
        alive: sessions that were heard of lately, or have models in memory.
    """
    database, answered, silent = journal.database, now - ANSWER_SECONDS, now - ROW_SECONDS
    journal.forget_answers(answered)
    count = database.delete("saves", _SAVES) + _repeated(database.delete, "operations", _OPERATIONS, silent)
    for session in _ended(database, silent, answered):
        if session not in alive:
            count += _end(database, session, answered)
    return count


def bound_answers(journal: Journal, most: int) -> int:
    """Throw away the oldest answers beyond ``most`` bytes, of the keys that have most of them; return how many."""
    database = journal.database
    if _used_bytes(database) <= most:
        return 0
    held = dict(database.select(_HELD, listing=True))
    share = _largest_share([*held.values()], most)
    beyond = [owner for owner, size in held.items() if size > share]
    return sum(_repeated(database.change, _FORGET_BEYOND, owner, share) for owner in beyond)


def _used_bytes(database: Database) -> int:
    """Return how many bytes of the file are in use, which says without reading a row that the answers are no more."""
    pages, free, size = (
        int(database.select(f"PRAGMA {name}", listing=True)[0][0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _largest_share(held: Collection[int], most: int) -> int:
    """Return the largest c such that the sum of ``min(h, c)`` is at most ``most``."""
    left = most
    for i, size in enumerate(sorted(held)):
        share = left // (len(held) - i)
        if size > share:
            return share
        left -= size
    return most


def _end(database: Database, session: str, before: float) -> int:
    """Delete what is left of a session that has ended."""
    count = _repeated(database.delete, "models", _MODELS, session)
    if database.select("SELECT 1 FROM models WHERE session = ? LIMIT 1", session):
        return count
    count += _repeated(database.delete, "operations", _SESSION_OPERATIONS, session, session, before)
    count += _repeated(database.delete, "samplers", _SAMPLERS, session, session)
    return count + database.delete("sessions", "id = ?", session)


def _ended(database: Database, silent: float, finished: float) -> Iterator[str]:
    """Sessions that were finished before one moment, or made before another and not finished."""
    last = ""
    while rows := database.select(_SESSIONS, last, silent, finished, ROWS_AT_ONCE, listing=True):
        yield from (session for (session,) in rows)
        last = rows[-1][0]


def _repeated(work: Callable[..., int], *given: object) -> int:
    """Do what changes so many rows at most until it finds none; return how many there were."""
    count = 0
    while changed := work(*given, ROWS_AT_ONCE):
        count += changed
    return count

"""Rows of the journal as their owner sees them: what belongs to another owner does not exist."""

from __future__ import annotations

from typing import Any

from ...errors import NotFoundError
from ..durability.journal import Journal

__all__ = ["own_model", "own_session"]

Row = dict[str, Any]


def own_session(journal: Journal, owner: str, session: Any) -> Row:
    """Return the row of a session.

    Raises:
        NotFoundError: there is none, or it is another owner's.
    """
    row = journal.session(session) if isinstance(session, str) else None
    return _own(journal, owner, row, f"session {session!r}")


def own_model(journal: Journal, owner: str, model_id: Any) -> Row:
    """Return the row of a model.

    Raises:
        NotFoundError: there is none, or it is another owner's.
    """
    row = journal.model(model_id) if isinstance(model_id, str) else None
    return _own(journal, owner, row, f"model {model_id!r}")


def _own(journal: Journal, owner: str, row: Row | None, what: str) -> Row:
    if row is None or row["owner"] != owner:
        raise NotFoundError(f"there is no {what} on this server{journal.caveat}")
    return row

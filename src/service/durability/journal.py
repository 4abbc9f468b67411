"""What the service has promised, in SQLite: sessions, models, checkpoints, and every operation with its answer.

Written before a client hears of it, so that a server that was killed knows afterwards what it had accepted and answered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from ...errors import ServiceError
from .answers import ACCEPTED, OPERATION, Accepted, Answer, Operation, accepted_of, encoded, operation_of
from .checkpoints import Checkpoints
from .database import ROWS_AT_ONCE, Database
from .schema import answer_checksum, checksum, is_whole

__all__ = ["ANSWER_SECONDS", "FORGET", "Journal"]

_NEWEST: Final = "ORDER BY created DESC, {} LIMIT ? OFFSET ?"
ANSWER_SECONDS: Final = 24 * 3600.0  # that an answer can be read
_ALL: Final = -1  # as a limit
FORGET: Final = (  # the answers to the requests that a query selects
    "UPDATE operations SET answer = NULL, answer_checksum = answer_checksum(request, form, NULL) "
    "WHERE request IN ({}) RETURNING 1"
)
_FORGET_OLD: Final = FORGET.format("SELECT request FROM operations WHERE answer IS NOT NULL AND created < ? LIMIT ?")
Row: TypeAlias = dict[str, Any]


@final
class Journal:
    """One SQLite file (WAL); safe to use from several threads.

    Args:
        path: of the file; its folder is made. See `Database` for what happens to one that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.database = Database(path)

    @property
    def caveat(self) -> str:
        """What to add where something is not found; empty, or in brackets what has happened to the journal."""
        caveat = self.database.caveat
        return f" ({caveat})" if caveat else ""

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def add_session(self, session: str, owner: str, metadata: Any) -> None:
        """Note a session."""
        self.database.put("sessions", session, owner, _json(metadata), time.time(), None, durable=True)

    def end_session(self, session: str) -> None:
        """Note that a session has been finished."""
        self.database.rewrite("sessions", session, ended=time.time())

    def sessions(self, owner: str, limit: int = _ALL, offset: int = 0) -> list[Row]:
        """Return an owner's sessions, newest first."""
        clause = f"WHERE owner = ? {_NEWEST.format('id')}"
        return self.database.rows("sessions", clause, owner, limit, offset, listing=True)

    def session(self, session: str) -> Row | None:
        """Return a session's row."""
        return _one(self.database.rows("sessions", "WHERE id = ?", session))

    def session_owner(self, session: str) -> str | None:
        """Return whose a session is; None if there is no such session."""
        row = self.session(session)
        return None if row is None else row["owner"]

    def add_model(
        self,
        model: str,
        session: str,
        owner: str,
        lora: dict[str, Any],
        metadata: Any,
        origin: str | None = None,
        *,
        created: float | None = None,
    ) -> None:
        """Note a model, and the checkpoint that it was made from; it was created (seconds of the epoch) now, or then."""
        moment = time.time() if created is None else created
        values = (model, session, owner, json.dumps(lora), _json(metadata), origin, moment)
        self.database.put("models", *values, durable=True)

    def set_lora(self, model: str, lora: dict[str, Any]) -> None:
        """Note that a model's adapter is another one now."""
        self.database.rewrite("models", model, lora=json.dumps(lora))

    def model(self, model: str) -> Row | None:
        """Return a model's row."""
        return _one(self.database.rows("models", "WHERE id = ?", model))

    def models(self, owner: str, limit: int = _ALL, offset: int = 0) -> list[Row]:
        """Return an owner's models, newest first."""
        clause = f"WHERE owner = ? {_NEWEST.format('id')}"
        return self.database.rows("models", clause, owner, limit, offset, listing=True)

    def models_in(self, session: str) -> list[Row]:
        """Return a session's models, newest first."""
        return self.database.rows("models", "WHERE session = ? ORDER BY created DESC, id", session, listing=True)

    def total(self, table: str, owner: str) -> int:
        """Return how many ``sessions``, ``models`` or ``checkpoints`` an owner has."""
        return self.database.total(table, owner)

    def add_sampler(
        self,
        sampler: str,
        owner: str,
        path: str | None,
        durable: bool,
        *,
        fingerprint: str | None = None,
        expires: float | None = None,
    ) -> None:
        """Note a sampling session: on a checkpoint, on the base (no path), or on weights that live in memory only.

        Args:
            sampler, owner: its id, and whose it is.
            path: of the checkpoint.
            durable: whether the weights are not in memory only.
            fingerprint: of the weights; None: not known, as in journals of older versions.
            expires: when its time to live ends, seconds of the epoch; None: never.
        """
        self.database.put("samplers", sampler, owner, path, int(durable), time.time(), fingerprint, expires)

    def bind_sampler(self, sampler: str, fingerprint: str) -> None:
        """Note which weights a sampling session is on."""
        self.database.rewrite("samplers", sampler, fingerprint=fingerprint)

    def sampler(self, sampler: str) -> Row | None:
        """Return a sampling session's row."""
        return _one(self.database.rows("samplers", "WHERE id = ?", sampler))

    def begin_save(
        self, uri: str, model: str, number: int, before: str, metadata: Any, expires: float | None = None
    ) -> None:
        """Note that operation ``number`` is about to write a checkpoint, and what lies there now.

        Raises:
            ValueError: the metadata are no JSON.
        """
        self.database.put("saves", model, number, uri, before, _json(metadata), expires)

    def begun_save(self, model: str, number: int) -> Row | None:
        """Return what was noted of a save that has begun: ``uri``, ``before``, ``metadata``, ``expires``."""
        rows = self.database.rows("saves", "WHERE model = ? AND number = ?", model, number, believe_all=False)
        return _one(rows)

    def add_checkpoint(
        self,
        uri: str,
        model: str,
        owner: str,
        number: int,
        size: int,
        metadata: Any,
        *,
        expires: float | None = None,
        created: float | None = None,
    ) -> None:
        """Note a checkpoint that is on the disk, and that it holds everything up to operation ``number``.

        Args:
            uri, model, owner: of the checkpoint.
            number: -1 = not known.
            size: bytes.
            metadata: what its client said of it.
            expires, created: seconds of the epoch; never, and now.
        """
        _, kind, name = Checkpoints.parts(uri)
        moment = time.time() if created is None else created
        values = (uri, model, kind, name, owner, number, size, _json(metadata), moment, expires)
        self.database.put("checkpoints", *values, durable=True)

    def set_expiry(self, uri: str, expires: float | None) -> None:
        """Note when a checkpoint's time to live ends; None: never."""
        self.database.rewrite("checkpoints", uri, expires=expires, durable=True)

    def drop_checkpoint(self, uri: str) -> None:
        """Forget a checkpoint."""
        self.database.delete("checkpoints", "uri = ?", uri)

    def checkpoint(self, uri: str) -> Row | None:
        """Return a checkpoint's row."""
        return _one(self.database.rows("checkpoints", "WHERE uri = ?", uri))

    def checkpoints(self, owner: str, model: str | None = None, limit: int = _ALL, offset: int = 0) -> list[Row]:
        """Return an owner's checkpoints, of one model or of all, newest first."""
        where, values = ("owner = ?", [owner]) if model is None else ("model = ? AND owner = ?", [model, owner])
        clause = f"WHERE {where} {_NEWEST.format('uri')}"
        return self.database.rows("checkpoints", clause, *values, limit, offset, listing=True)

    def checkpoints_in(self, model: str) -> int:
        """Return how many checkpoints a model has."""
        return int(self.database.select("SELECT count(*) FROM checkpoints WHERE model = ?", model, listing=True)[0][0])

    def stored_bytes(self, owner: str | None = None) -> int:
        """Return the bytes of an owner's checkpoints, or of all owners'."""
        where, values = ("", ()) if owner is None else (" WHERE owner = ?", (owner,))
        return int(self.database.select(f"SELECT coalesce(sum(bytes), 0) FROM checkpoints{where}", *values)[0][0])

    def named_checkpoints(self, owner: str, name: str) -> list[Row]:
        """Return an owner's checkpoints of a name that training can go on from."""
        return self.database.rows("checkpoints", "WHERE owner = ? AND kind = 'weights' AND name = ?", owner, name)

    def trainable_checkpoints(self, owner: str, limit: int = _ALL) -> list[Row]:
        """Return an owner's checkpoints that training can go on from, by name."""
        clause = "WHERE owner = ? AND kind = 'weights' ORDER BY name LIMIT ?"
        return self.database.rows("checkpoints", clause, owner, limit, listing=True)

    def newest_checkpoint(self, model: str, kind: str) -> Row | None:
        """Return a model's newest checkpoint of a kind."""
        clause = "WHERE model = ? AND kind = ? ORDER BY number DESC LIMIT 1"
        return _one(self.database.rows("checkpoints", clause, model, kind))

    def last_checkpoint(self, model: str) -> str | None:
        """Return a model's newest checkpoint that training can go on from: its URI, and in words what it holds."""
        row = self.newest_checkpoint(model, "weights")
        if row is not None:
            number = row["number"]
            holds = f"all up to seq_id {number}" if number >= 0 else "up to which seq_id is not known"
            return f"{row['uri']} ({holds})"
        made = self.model(model)
        return f"{made['origin']} (which it was made from)" if made and made["origin"] else None

    def expired(self, now: float) -> list[str]:
        """Return the URIs of checkpoints whose time to live has passed."""
        return [row["uri"] for row in self.database.rows("checkpoints", "WHERE expires <= ?", now, listing=True)]

    def forget_saves(self) -> None:
        """Forget the saves that have begun: all have ended."""
        self.database.delete("saves", "1")

    def all_checkpoints(self) -> list[str]:
        """Return the URIs of all owners' checkpoints; those whose entry is damaged are forgotten first."""
        self.database.drop_damaged("checkpoints")
        return [row["uri"] for row in self.database.rows("checkpoints", "", listing=True)]

    def accept(self, request: str, owner: str, queue: str, number: int | None, digest: str, kind: str) -> None:
        """Note an operation, before it runs and before its client hears of it."""
        values = (request, owner, queue, number, digest, kind, time.time())
        written = (*values, checksum("operations", values), answer_checksum(request, None, None))
        self.database.write(("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, NULL)", written))

    def finish(self, request: str, answer: Answer) -> None:
        """Note how an operation ended."""
        form, blob = encoded(answer)
        statement = "UPDATE operations SET form = ?, answer_checksum = ?, answer = ? WHERE request = ?"
        self.database.write((statement, (form, answer_checksum(request, form, blob), blob, request)))

    def numbered(self, queue: str, number: int) -> Accepted | None:
        """Return the operation that used a number."""
        rows = self.database.select(f"{ACCEPTED} WHERE line = ? AND number = ?", queue, number)
        return accepted_of(rows[0]) if rows else None

    def operation(self, request: str) -> Operation | None:
        """Return an accepted operation with its answer, which may be large."""
        rows = self.database.select(f"{OPERATION} WHERE request = ?", request, listing=True)
        return operation_of(rows[0]) if rows else None

    def forget_answers(self, before: float) -> None:
        """Throw away answers from before a moment (seconds of the epoch); that they were given stays known."""
        while self.database.change(_FORGET_OLD, before, ROWS_AT_ONCE) == ROWS_AT_ONCE:
            pass

    def last_number(self, queue: str) -> int:
        """Return the largest number of a queue whose turn has been; 0: none."""
        query = "SELECT max(number) FROM operations WHERE line = ? AND form IS NOT NULL"
        return int(self.database.select(query, queue)[0][0] or 0)

    def unfinished(self) -> Sequence[Accepted]:
        """Return all that have not ended, but for those whose entry is damaged: who asks for them is told so."""
        rows = self.database.select(f"{ACCEPTED} WHERE form IS NULL")
        return [accepted_of(row) for row in rows if is_whole(checksum("operations", row[:-1]), row[-1])]


def _one(rows: Sequence[Row]) -> Row | None:
    return rows[0] if rows else None


def _json(given: Any) -> str:
    try:
        written = json.dumps(given, allow_nan=False, ensure_ascii=False)
        written.encode()
    except ValueError as error:  # a listing could not be sent with it
        raise ServiceError(f"metadata must be JSON, without NaN and halves of characters: {error}") from error
    return json.dumps(given)

"""What the service has promised, in SQLite: sessions, models, checkpoints, and every operation with its answer.

Written before a client hears of it, so that a server that was killed knows afterwards what it had accepted and answered.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, final

from ...errors import ServiceError
from .checkpoints import Checkpoints

__all__ = ["Answer", "Failure", "Journal", "Operation", "lock_folder"]

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS models (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, lora TEXT NOT NULL, metadata TEXT NOT NULL,
  origin TEXT, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS samplers (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, path TEXT, durable INTEGER NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints (
  uri TEXT PRIMARY KEY, model TEXT NOT NULL, owner TEXT NOT NULL, number INTEGER NOT NULL, bytes INTEGER NOT NULL,
  metadata TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS saves (
  model TEXT NOT NULL, number INTEGER NOT NULL, uri TEXT NOT NULL, before TEXT NOT NULL, metadata TEXT NOT NULL,
  PRIMARY KEY (model, number));
CREATE TABLE IF NOT EXISTS operations (
  request TEXT PRIMARY KEY, owner TEXT NOT NULL, line TEXT NOT NULL, number INTEGER, digest TEXT NOT NULL,
  kind TEXT NOT NULL, form TEXT, answer BLOB, created REAL NOT NULL, UNIQUE (line, number));
CREATE INDEX IF NOT EXISTS unfinished ON operations (form) WHERE form IS NULL;
CREATE INDEX IF NOT EXISTS by_age ON operations (created) WHERE answer IS NOT NULL;
"""


@final
@dataclass(frozen=True)
class Failure:
    """What a client reads of a failed operation.

    Attributes:
        text: the error's.
        category: whose fault it is, ``user`` or ``server``.
    """

    text: str
    category: str


Answer: TypeAlias = bytes | dict[str, Any] | Failure


@final
@dataclass(frozen=True)
class Operation:
    """One accepted operation of one queue; ``answer`` is None until it has ended, ``expired`` if its answer was thrown away."""

    request: str
    owner: str
    queue: str
    number: int | None
    digest: str
    kind: str
    answer: Answer | None
    expired: bool


@final
class Journal:
    """One SQLite file (WAL); safe to use from several threads.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        (known,), (tables,) = (
            self._db.execute(q).fetchone() for q in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if tables and known != _VERSION:
            raise ServiceError(
                f"{path} is a journal of version {known}, and this server writes {_VERSION}: serve from another folder"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")  # survives the process; what must survive the machine says so
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def add_session(self, session: str, owner: str, metadata: Any) -> None:
        """Note a session."""
        values = (session, owner, _json(metadata), time.time())
        self._write_through("INSERT INTO sessions VALUES (?, ?, ?, ?)", *values)

    def sessions(self, owner: str) -> list[dict[str, Any]]:
        """Return an owner's sessions, newest first."""
        return self._read("SELECT * FROM sessions WHERE owner = ? ORDER BY created DESC, id", owner)

    def session_owner(self, session: str) -> str | None:
        """Return whose a session is; None if there is no such session."""
        rows = self._read("SELECT owner FROM sessions WHERE id = ?", session)
        return rows[0]["owner"] if rows else None

    def add_model(
        self, model: str, session: str, owner: str, lora: dict[str, Any], metadata: Any, origin: str | None = None
    ) -> None:
        """Note a model, and the checkpoint that it was made from."""
        values = (model, session, owner, json.dumps(lora), _json(metadata), origin, time.time())
        self._write_through("INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?)", *values)

    def set_lora(self, model: str, lora: dict[str, Any]) -> None:
        """Note that a model's adapter is another one now."""
        self._write("UPDATE models SET lora = ? WHERE id = ?", json.dumps(lora), model)

    def model(self, model: str) -> dict[str, Any] | None:
        """Return a model's row."""
        rows = self._read("SELECT * FROM models WHERE id = ?", model)
        return rows[0] if rows else None

    def models(self, owner: str) -> list[dict[str, Any]]:
        """Return an owner's models, newest first."""
        return self._read("SELECT * FROM models WHERE owner = ? ORDER BY created DESC, id", owner)

    def add_sampler(self, sampler: str, owner: str, path: str | None, durable: bool) -> None:
        """Note a sampling session: on a checkpoint, on the base (no path), or on weights that live in memory only."""
        values = (sampler, owner, path, int(durable), time.time())
        self._write("INSERT OR REPLACE INTO samplers VALUES (?, ?, ?, ?, ?)", *values)

    def sampler(self, sampler: str) -> dict[str, Any] | None:
        """Return a sampling session's row."""
        rows = self._read("SELECT * FROM samplers WHERE id = ?", sampler)
        return rows[0] if rows else None

    def begin_save(self, uri: str, model: str, number: int, before: str, metadata: Any) -> None:
        """Note that operation ``number`` is about to write a checkpoint, and what lies there now.

        Raises:
            ValueError: the metadata are no JSON.
        """
        self._write("INSERT OR REPLACE INTO saves VALUES (?, ?, ?, ?, ?)", model, number, uri, before, _json(metadata))

    def begun_save(self, model: str, number: int) -> dict[str, Any] | None:
        """Return what was noted of a save that has begun: ``uri``, ``before``, ``metadata``."""
        rows = self._read("SELECT * FROM saves WHERE model = ? AND number = ?", model, number)
        return rows[0] if rows else None

    def add_checkpoint(self, uri: str, model: str, owner: str, number: int, size: int, metadata: Any) -> None:
        """Note a checkpoint that is on the disk, and that it holds everything up to operation ``number``."""
        values = (uri, model, owner, number, size, _json(metadata), time.time())
        self._write_through("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?)", *values)

    def drop_checkpoint(self, uri: str) -> None:
        """Forget a checkpoint."""
        self._write("DELETE FROM checkpoints WHERE uri = ?", uri)

    def checkpoints(self, owner: str, model: str | None = None) -> list[dict[str, Any]]:
        """Return an owner's checkpoints, of one model or of all, newest first."""
        where, values = ("", (owner,)) if model is None else (" AND model = ?", (owner, model))
        return self._read(f"SELECT * FROM checkpoints WHERE owner = ?{where} ORDER BY created DESC, uri", *values)

    def stored_bytes(self, owner: str | None = None) -> int:
        """Return the bytes of an owner's checkpoints, or of all owners'."""
        where, values = ("", ()) if owner is None else (" WHERE owner = ?", (owner,))
        return int(self._read(f"SELECT coalesce(sum(bytes), 0) AS total FROM checkpoints{where}", *values)[0]["total"])

    def last_checkpoint(self, model: str) -> str | None:
        """Return a model's newest checkpoint that training can go on from: its URI, and in words what it holds."""
        for row in self._read("SELECT uri, number FROM checkpoints WHERE model = ? ORDER BY rowid DESC", model):
            if Checkpoints.parts(row["uri"])[1] == "weights":
                return f"{row['uri']} (all up to seq_id {row['number']})"
        made = self.model(model)
        return f"{made['origin']} (which it was made from)" if made and made["origin"] else None

    def forget_saves(self) -> None:
        """Forget the saves that have begun: all have ended."""
        self._write("DELETE FROM saves")

    def all_checkpoints(self) -> list[str]:
        """Return the URIs of all owners' checkpoints."""
        return [row["uri"] for row in self._read("SELECT uri FROM checkpoints")]

    def accept(self, request: str, owner: str, queue: str, number: int | None, digest: str, kind: str) -> None:
        """Note an operation, before it runs and before its client hears of it."""
        values = (request, owner, queue, number, digest, kind, time.time())
        self._write("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, ?)", *values)

    def finish(self, request: str, answer: Answer) -> None:
        """Note how an operation ended."""
        form, blob = _encoded(answer)
        self._write("UPDATE operations SET form = ?, answer = ? WHERE request = ?", form, blob, request)

    def numbered(self, queue: str, number: int) -> Operation | None:
        """Return the operation that used a number."""
        return self._operation("line = ? AND number = ?", queue, number)

    def operation(self, request: str) -> Operation | None:
        """Return an accepted operation."""
        return self._operation("request = ?", request)

    def unfinished(self) -> Sequence[Operation]:
        """Return all that have not ended."""
        return [_operation(row) for row in self._read("SELECT * FROM operations WHERE form IS NULL")]

    def forget_answers(self, before: float) -> None:
        """Throw away answers from before a moment (seconds of the epoch); that they were given stays known."""
        self._write("UPDATE operations SET answer = NULL WHERE answer IS NOT NULL AND created < ?", before)

    def _operation(self, where: str, *values: Any) -> Operation | None:
        rows = self._read(f"SELECT * FROM operations WHERE {where}", *values)
        return _operation(rows[0]) if rows else None

    def _write(self, statement: str, *values: Any) -> None:
        with self._lock:
            self._db.execute(statement, values)

    def _write_through(self, statement: str, *values: Any) -> None:
        """Write, and wait until it and all before it are on the disk."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                self._db.execute(statement, values)
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    def _read(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock:
            cursor = self._db.execute(statement, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def lock_folder(folder: Path) -> sqlite3.Connection:
    """Keep other servers out of a folder until the returned connection is closed, or this process ends.

    Raises:
        ServiceError: another server uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(folder / "held.sqlite", timeout=0.0, check_same_thread=False, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise ServiceError(f"another server uses {folder}: stop it, or serve from another folder") from error
    return lock


def _operation(row: dict[str, Any]) -> Operation:
    expired = row["form"] is not None and row["answer"] is None
    answer = None if row["answer"] is None else _decoded(row["form"], row["answer"])
    fields = {key: row[key] for key in ("request", "owner", "number", "digest", "kind")}
    return Operation(**fields, queue=row["line"], answer=answer, expired=expired)


def _json(given: Any) -> str:
    return json.dumps(given, allow_nan=False)  # a listing could not be sent with NaN in it


def _encoded(answer: Answer) -> tuple[str, bytes]:
    if isinstance(answer, bytes):
        return "protobuf", answer
    if isinstance(answer, Failure):
        return "failure", json.dumps([answer.text, answer.category]).encode()
    return "json", json.dumps(answer).encode()


def _decoded(form: str, blob: bytes) -> Answer:
    if form == "protobuf":
        return bytes(blob)
    content = json.loads(blob)
    return Failure(*content) if form == "failure" else dict(content)

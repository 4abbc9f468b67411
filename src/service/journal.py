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

__all__ = ["Answer", "Failure", "Journal", "Operation"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS models (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, lora TEXT NOT NULL, metadata TEXT NOT NULL,
  created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS samplers (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, path TEXT, durable INTEGER NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS checkpoints (
  uri TEXT PRIMARY KEY, model TEXT NOT NULL, owner TEXT NOT NULL, bytes INTEGER NOT NULL, metadata TEXT NOT NULL,
  created REAL NOT NULL);
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
    """One accepted operation; ``answer`` is None until it has ended, ``expired`` if its answer was thrown away."""

    request: str
    owner: str
    line: str
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
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")  # survives the process; FULL would survive the machine
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def add_session(self, session: str, owner: str, metadata: Any) -> None:
        """Note a session."""
        self._write("INSERT INTO sessions VALUES (?, ?, ?, ?)", session, owner, json.dumps(metadata), time.time())

    def sessions(self, owner: str) -> list[dict[str, Any]]:
        """Return an owner's sessions, newest first."""
        return self._read("SELECT * FROM sessions WHERE owner = ? ORDER BY created DESC, id", owner)

    def session_owner(self, session: str) -> str | None:
        """Return whose a session is; None if there is no such session."""
        found = self._read("SELECT owner FROM sessions WHERE id = ?", session)
        return found[0]["owner"] if found else None

    def add_model(self, model: str, session: str, owner: str, lora: dict[str, Any], metadata: Any) -> None:
        """Note a model."""
        values = (model, session, owner, json.dumps(lora), json.dumps(metadata), time.time())
        self._write("INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?)", *values)

    def model(self, model: str) -> dict[str, Any] | None:
        """Return a model's row."""
        found = self._read("SELECT * FROM models WHERE id = ?", model)
        return found[0] if found else None

    def models(self, owner: str) -> list[dict[str, Any]]:
        """Return an owner's models, newest first."""
        return self._read("SELECT * FROM models WHERE owner = ? ORDER BY created DESC, id", owner)

    def add_sampler(self, sampler: str, owner: str, path: str | None, durable: bool) -> None:
        """Note a sampling session: on a checkpoint, on the base (no path), or on weights that live in memory only."""
        values = (sampler, owner, path, int(durable), time.time())
        self._write("INSERT OR REPLACE INTO samplers VALUES (?, ?, ?, ?, ?)", *values)

    def sampler(self, sampler: str) -> dict[str, Any] | None:
        """Return a sampling session's row."""
        found = self._read("SELECT * FROM samplers WHERE id = ?", sampler)
        return found[0] if found else None

    def add_checkpoint(self, uri: str, model: str, owner: str, size: int, metadata: Any) -> None:
        """Note a checkpoint that is on the disk."""
        values = (uri, model, owner, size, json.dumps(metadata), time.time())
        self._write("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?)", *values)

    def drop_checkpoint(self, uri: str) -> None:
        """Forget a checkpoint."""
        self._write("DELETE FROM checkpoints WHERE uri = ?", uri)

    def checkpoints(self, owner: str, model: str | None = None) -> list[dict[str, Any]]:
        """Return an owner's checkpoints, of one model or of all, newest first."""
        where, values = ("", (owner,)) if model is None else (" AND model = ?", (owner, model))
        return self._read(f"SELECT * FROM checkpoints WHERE owner = ?{where} ORDER BY created DESC, uri", *values)

    def last_checkpoint(self, model: str) -> str | None:
        """Return the URI of a model's newest checkpoint that training can go on from."""
        found = self._read("SELECT uri FROM checkpoints WHERE model = ? ORDER BY created DESC", model)
        return next((row["uri"] for row in found if row["uri"].split("/")[3] == "weights"), None)

    def accept(self, request: str, owner: str, line: str, number: int | None, digest: str, kind: str) -> None:
        """Note an operation, before it runs and before its client hears of it."""
        values = (request, owner, line, number, digest, kind, time.time())
        self._write("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, ?)", *values)

    def finish(self, request: str, answer: Answer) -> None:
        """Note how an operation ended."""
        form, blob = _encoded(answer)
        self._write("UPDATE operations SET form = ?, answer = ? WHERE request = ?", form, blob, request)

    def numbered(self, line: str, number: int) -> Operation | None:
        """Return the operation that used a number."""
        return self._operation("line = ? AND number = ?", line, number)

    def operation(self, request: str) -> Operation | None:
        """Return an accepted operation."""
        return self._operation("request = ?", request)

    def unfinished(self) -> Sequence[tuple[str, str]]:
        """Return request and line of all that have not ended."""
        return [(r["request"], r["line"]) for r in self._read("SELECT * FROM operations WHERE form IS NULL")]

    def forget_answers(self, before: float) -> None:
        """Throw away answers from before a moment (seconds of the epoch); that they were given stays known."""
        self._write("UPDATE operations SET answer = NULL WHERE answer IS NOT NULL AND created < ?", before)

    def _operation(self, where: str, *values: Any) -> Operation | None:
        found = self._read(f"SELECT * FROM operations WHERE {where}", *values)
        if not found:
            return None
        row = found[0]
        expired = row["form"] is not None and row["answer"] is None
        answer = None if row["answer"] is None else _decoded(row["form"], row["answer"])
        return Operation(row["request"], row["owner"], row["line"], row["digest"], row["kind"], answer, expired)

    def _write(self, statement: str, *values: Any) -> None:
        with self._lock:
            self._db.execute(statement, values)

    def _read(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock:
            cursor = self._db.execute(statement, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _encoded(answer: Answer) -> tuple[str, bytes]:
    if isinstance(answer, bytes):
        return "protobuf", answer
    if isinstance(answer, Failure):
        return "failure", json.dumps([answer.text, answer.category]).encode()
    return "json", json.dumps(answer).encode()


def _decoded(form: str, blob: bytes) -> Answer:
    if form == "protobuf":
        return bytes(blob)
    found = json.loads(blob)
    return Failure(*found) if form == "failure" else dict(found)

"""The tables of the journal, the checksum of each row, and how journals of older versions become ones of this version."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from typing import Any, Final

from .checkpoints import Checkpoints

__all__ = ["COLUMNS", "VERSION", "answer_checksum", "checksum", "create", "is_whole", "migrate", "register", "shape"]

VERSION: Final = 3
COLUMNS: Final[dict[str, tuple[str, ...]]] = {  # what the checksum of a row covers
    "meta": ("key", "value"),
    "sessions": ("id", "owner", "metadata", "created", "ended"),
    "models": ("id", "session", "owner", "lora", "metadata", "origin", "created"),
    "samplers": ("id", "owner", "path", "durable", "created", "fingerprint", "expires"),
    "checkpoints": ("uri", "model", "kind", "name", "owner", "number", "bytes", "metadata", "created", "expires"),
    "saves": ("model", "number", "uri", "before", "metadata", "expires"),
    "operations": ("request", "owner", "line", "number", "digest", "kind", "created"),
}
_SCHEMA: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE sessions (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL, ended REAL,
  checksum BLOB NOT NULL);
CREATE INDEX sessions_of ON sessions (owner, created DESC, id);
CREATE TABLE models (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, lora TEXT NOT NULL, metadata TEXT NOT NULL,
  origin TEXT, created REAL NOT NULL, checksum BLOB NOT NULL);
CREATE INDEX models_of ON models (owner, created DESC, id);
CREATE INDEX models_in ON models (session, created DESC, id);
CREATE TABLE samplers (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, path TEXT, durable INTEGER NOT NULL, created REAL NOT NULL,
  fingerprint TEXT, expires REAL, checksum BLOB NOT NULL);
CREATE TABLE checkpoints (
  uri TEXT PRIMARY KEY, model TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, owner TEXT NOT NULL,
  number INTEGER NOT NULL, bytes INTEGER NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL, expires REAL,
  checksum BLOB NOT NULL);
CREATE INDEX checkpoints_of ON checkpoints (owner, created DESC, uri);
CREATE INDEX checkpoints_in ON checkpoints (model, created DESC, uri);
CREATE INDEX newest_checkpoint ON checkpoints (model, kind, number DESC);
CREATE INDEX named_checkpoints ON checkpoints (owner, kind, name);
CREATE INDEX expiring ON checkpoints (expires) WHERE expires IS NOT NULL;
CREATE TABLE saves (
  model TEXT NOT NULL, number INTEGER NOT NULL, uri TEXT NOT NULL, before TEXT NOT NULL, metadata TEXT NOT NULL,
  expires REAL, checksum BLOB NOT NULL, PRIMARY KEY (model, number));
CREATE TABLE operations (
  request TEXT PRIMARY KEY, owner TEXT NOT NULL, line TEXT NOT NULL, number INTEGER, digest TEXT NOT NULL,
  kind TEXT NOT NULL, created REAL NOT NULL, checksum BLOB NOT NULL, form TEXT, answer_checksum BLOB NOT NULL,
  answer BLOB, UNIQUE (line, number));
CREATE INDEX unfinished ON operations (form) WHERE form IS NULL;
CREATE INDEX answered ON operations (created) WHERE answer IS NOT NULL;
CREATE INDEX by_age ON operations (created);
"""
_OLD: Final = ("sessions", "models", "samplers", "checkpoints", "operations")
_OLD_SAVES: Final = """
CREATE TABLE IF NOT EXISTS saves (
  model TEXT NOT NULL, number INTEGER NOT NULL, uri TEXT NOT NULL, before TEXT NOT NULL, metadata TEXT NOT NULL,
  PRIMARY KEY (model, number))
"""
_ADDED: Final = {  # what older versions do not have, by what they had
    ("sessions", "ended"): "NULL",
    ("samplers", "fingerprint"): "NULL",
    ("samplers", "expires"): "NULL",
    ("checkpoints", "kind"): "uri_part(uri, 1)",
    ("checkpoints", "name"): "uri_part(uri, 2)",
    ("checkpoints", "expires"): "NULL",
    ("saves", "expires"): "NULL",
}


def checksum(table: str, values: Sequence[Any]) -> bytes:
    """Return the checksum of a row: that of its table's name and of the values of `COLUMNS`."""
    return hashlib.blake2b(repr((table, *values)).encode(), digest_size=8).digest()


def answer_checksum(request: str, form: str | None, answer: bytes | None) -> bytes:
    """Return the checksum of an operation's answer; it has one before it has an answer, and after that was thrown away."""
    digest = hashlib.blake2b(repr((request, form, answer is None)).encode(), digest_size=8)
    digest.update(answer or b"")
    return digest.digest()


def is_whole(computed: bytes, written: Any) -> bool:
    """Whether what was read has the checksum that was written with it."""
    return bool(computed == written)


def register(db: sqlite3.Connection) -> None:
    """Let SQL statements use the checksums."""
    db.create_function("row_checksum", -1, lambda table, *values: checksum(table, values), deterministic=True)
    db.create_function("answer_checksum", 3, answer_checksum, deterministic=True)
    db.create_function("uri_part", 2, lambda uri, part: Checkpoints.parts(uri)[part], deterministic=True)


def create(db: sqlite3.Connection) -> None:
    """Make the tables in an empty database, within a transaction of the caller's."""
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            db.execute(statement)
    db.execute(f"PRAGMA user_version={VERSION}")


def shape(version: int) -> set[tuple[str, ...]]:
    """Return what `sqlite_master` must hold in a journal of a version: type, name, table and, of this version, statement."""
    if version != VERSION:
        return {("table", name, name) for name in (_OLD if version == 1 else COLUMNS)}
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        create(db)
        return set(db.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master"))
    finally:
        db.close()


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Turn a journal of an older version into one of this version, within a transaction of the caller's."""
    if version == 1:
        _migrate_all(db)
    else:
        _migrate_samplers(db)


def _migrate_samplers(db: sqlite3.Connection) -> None:
    """Add what version 2 does not know of samplers; a row that was damaged before keeps its checksum, which stays wrong."""
    columns = COLUMNS["samplers"]
    before = ", ".join(column for column in columns if ("samplers", column) not in _ADDED)
    after = ", ".join(_ADDED.get(("samplers", column), column) for column in columns)
    whole = f"row_checksum('samplers', {before}) = checksum"
    (made,) = (statement for statement in _SCHEMA.split(";") if "CREATE TABLE samplers" in statement)
    db.execute("ALTER TABLE samplers RENAME TO old_samplers")
    db.execute(made)
    db.execute(
        f"INSERT INTO samplers ({', '.join(columns)}, checksum) SELECT {after}, "
        f"CASE WHEN {whole} THEN row_checksum('samplers', {after}) ELSE checksum END FROM old_samplers"
    )
    db.execute("DROP TABLE old_samplers")
    db.execute(f"PRAGMA user_version={VERSION}")


def _migrate_all(db: sqlite3.Connection) -> None:
    db.execute(_OLD_SAVES)
    indices = db.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
    for (name,) in indices:
        db.execute(f'DROP INDEX "{name}"')
    for table in (*_OLD, "saves"):
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    create(db)
    for table in (*_OLD, "saves"):
        _copy(db, table)
        db.execute(f"DROP TABLE old_{table}")


def _copy(db: sqlite3.Connection, table: str) -> None:
    columns = COLUMNS[table]
    values = ", ".join(_ADDED.get((table, column), column) for column in columns)
    into, given = f"{', '.join(columns)}, checksum", f"{values}, row_checksum('{table}', {values})"
    if table == "operations":
        into += ", form, answer_checksum, answer"
        given += ", form, answer_checksum(request, form, answer), answer"
    db.execute(f"INSERT INTO {table} ({into}) SELECT {given} FROM old_{table}")

"""The file of the journal: checked when it is opened, written in counted transactions, read with the checksum of each row."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from ...backends.native.checkpoints.files import MANIFEST
from ...errors import StorageError
from .integrity import Mark, damage_of, set_aside
from .schema import COLUMNS, VERSION, checksum, create, is_whole, migrate, register
from .storage import explained

__all__ = ["ROWS_AT_ONCE", "Database", "Statement", "damaged_row"]

_logger = logging.getLogger(__name__)
_COUNTED: Final = ("sessions", "models", "checkpoints")  # that listings give totals of
_SAFETY_PAGES: Final = 16_384  # of a log that nobody has written back yet; see `Database.write_back`
_CAVEAT_SECONDS: Final = 7 * 24 * 3600.0  # how long a damage is told to clients
ROWS_AT_ONCE: Final = 500  # that one transaction should change: whoever writes waits no longer than for these
Statement = tuple[str, Sequence[Any]]
Row = dict[str, Any]


@dataclass
class _Connection:
    """A connection, and the lock without which it must not be used."""

    db: sqlite3.Connection
    lock: threading.Lock = field(default_factory=threading.Lock)


def damaged_row(table: str) -> StorageError:
    """Return the error for a row whose checksum is wrong."""
    return StorageError(
        f"an entry of the server's journal ({table}) is damaged: its checksum is not that of what it says, so it is not "
        "believed; go on from a checkpoint, or ask the server's operator"
    )


@final
class Database:
    """One SQLite file (WAL); safe to use from several threads, and reading a listing does not delay a write.

    A file that is damaged is set aside, one that is missing beside checkpoints is made anew, and one that has lost its end is
    used as it is: `caveat` says so.

    Args:
        path: of the file; its folder is made.

    Raises:
        ServiceError: it is a journal of another version.
        StorageError: the folder cannot be written, or its disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._mark = path, Mark(path.with_suffix(".mark"))
        self._totals: Counter[tuple[str, str]] = Counter()
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            damage = damage_of(path)
            aside = set_aside(path) if damage else None
            self._writer = _Connection(_connected(path))
            try:
                incident = self._begin(damage)
                self._reader = _Connection(_connected(path))
            except BaseException:
                self._writer.db.close()
                raise
        if incident:
            _logger.warning("%s: %s%s", path, incident, f"; it was set aside as {aside.name}" if aside else "")

    def _begin(self, damage: str | None) -> str | None:
        """Make or migrate the tables; return what has been lost, as a sentence, or nothing."""
        db = self._writer.db
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")  # survives the process; what must survive the machine says so
        db.execute(f"PRAGMA wal_autocheckpoint={_SAFETY_PAGES}")
        (version,), (tables,) = (
            db.execute(q).fetchone() for q in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        self._written, marked = 0, self._mark.read()
        if tables and version > 1:
            self._written = int(self.meta("written") or 0)
        elif not tables:
            self._transact(db, lambda: create(db))
        incident = self._incident(damage, bool(tables), marked)
        self._written = max(self._written, marked or 0)  # else the mark would tell of the loss for ever
        if tables and version < VERSION:
            self._transact(db, lambda: migrate(db, version))
        if incident:
            self._transact(db, lambda: self._execute(_meta("incident", json.dumps([incident, time.time()]))))
        self._caveat = self._known_caveat()
        self._count_rows()
        return incident

    def _incident(self, damage: str | None, had_tables: bool, marked: int | None) -> str | None:
        gone = "sessions, models without a checkpoint, and answers from before are not known any more"
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        if damage:
            return f"the journal was damaged ({damage}) and made anew from the checkpoints on {when}; {gone}"
        if not had_tables and (marked or any(self._path.parent.glob(f"*/*weights/*/{MANIFEST}"))):
            return f"the journal was missing and made anew from the checkpoints on {when}; {gone}"
        if marked is not None and marked > self._written:
            return (
                f"the journal had lost its end when the server was started on {when}: {marked - self._written} of what was "
                "written last (sessions, models, answers) is not known any more"
            )
        return None

    @property
    def caveat(self) -> str:
        """What to add where something is not found: what has happened to the journal; empty if nothing has."""
        return self._caveat

    def close(self) -> None:
        """Close the file."""
        for connection in (self._reader, self._writer):
            with connection.lock:
                connection.db.close()
        self._mark.close()

    def meta(self, key: str) -> str | None:
        """Return an entry about the journal itself."""
        rows = self._fetch(self._writer.db, "meta", "WHERE key = ?", (key,))
        return rows[0]["value"] if rows else None

    def total(self, table: str, owner: str) -> int:
        """Return how many rows of a table are an owner's, without reading them."""
        return self._totals[table, owner]

    def rewrite(self, table: str, key: str, *, durable: bool = False, **columns: Any) -> None:
        """Give some columns of the row with a key other values; nothing happens where there is none."""
        for row in self.rows(table, f"WHERE {COLUMNS[table][0]} = ?", key):
            self.put(table, *{**row, **columns}.values(), durable=durable)

    def put(self, table: str, *values: Any, durable: bool = False) -> None:
        """Write a row, over that of the same key.

        Args:
            table: its table.
            values: as `COLUMNS` has them.
            durable: return only when it is on the disk, with all that was written before.
        """
        statement = f"INSERT OR REPLACE INTO {table} VALUES ({'?, ' * len(values)}?)"
        counted = table in _COUNTED
        with self._writer.lock, explained():
            query = f"SELECT owner FROM {table} WHERE {COLUMNS[table][0]} = ?"
            before = self._execute((query, values[:1])) if counted else []
            self._transact(self._writer.db, lambda: self._execute((statement, (*values, checksum(table, values)))))
            if counted:
                self._move(table, [owner for (owner,) in before], -1)
                self._move(table, [values[COLUMNS[table].index("owner")]], 1)
        if durable:
            self._sync()

    def write(self, *statements: Statement) -> None:
        """Run statements that change no counted table, all or none."""
        with self._writer.lock, explained():
            self._transact(self._writer.db, lambda: [self._execute(statement) for statement in statements])

    def change(self, statement: str, *values: Any) -> int:
        """Run one statement that returns the rows it has changed; return how many."""
        with self._writer.lock, explained():
            return len(self._transact(self._writer.db, lambda: self._execute((statement, values))))

    def delete(self, table: str, where: str, *values: Any) -> int:
        """Delete rows; return how many."""
        returned = "owner" if table in _COUNTED else "1"
        with self._writer.lock, explained():
            statement = (f"DELETE FROM {table} WHERE {where} RETURNING {returned}", values)
            rows = self._transact(self._writer.db, lambda: self._execute(statement))
            if table in _COUNTED:
                self._move(table, [owner for (owner,) in rows], -1)
            return len(rows)

    def drop_damaged(self, table: str) -> int:
        """Delete the rows whose checksums are wrong; return how many."""
        return self.delete(table, f"row_checksum('{table}', {', '.join(COLUMNS[table])}) != checksum")

    def rows(self, table: str, clause: str, *values: Any, listing: bool = False, believe_all: bool = True) -> list[Row]:
        """Read rows whose checksums are right.

        Args:
            table: its columns are `COLUMNS`.
            clause: of SQL, after the name of the table.
            values: of its placeholders.
            listing: it may be long: those who write do not wait for it.
            believe_all: a row whose checksum is wrong is an error; otherwise it is left out.

        Raises:
            StorageError: a checksum is wrong, or the file cannot be read.
        """
        connection = self._reader if listing else self._writer
        with connection.lock, explained():
            return self._fetch(connection.db, table, clause, values, believe_all)

    def select(self, statement: str, *values: Any, listing: bool = False) -> list[tuple[Any, ...]]:
        """Read anything but whole rows; checksums are left to the caller."""
        connection = self._reader if listing else self._writer
        with connection.lock, explained():
            return connection.db.execute(statement, values).fetchall()

    def write_back(self) -> None:
        """Move what the write-ahead log holds into the file; nobody who reads or writes waits for it."""
        with self._reader.lock, explained():
            self._reader.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def watch(self, handler: Callable[[], int] | None, steps: int) -> None:
        """Call a handler each time SQLite has run so many instructions; see `sqlite3.Connection.set_progress_handler`."""
        for connection in (self._writer, self._reader):
            connection.db.set_progress_handler(handler, steps)

    def _fetch(
        self, db: sqlite3.Connection, table: str, clause: str, values: Sequence[Any], believe_all: bool = True
    ) -> list[Row]:
        columns = COLUMNS[table]
        rows = db.execute(f"SELECT {', '.join(columns)}, checksum FROM {table} {clause}", values).fetchall()
        whole = [row[:-1] for row in rows if is_whole(checksum(table, row[:-1]), row[-1])]
        if believe_all and len(whole) != len(rows):
            raise damaged_row(table)
        return [dict(zip(columns, row, strict=True)) for row in whole]

    def _execute(self, statement: Statement) -> list[tuple[Any, ...]]:
        return self._writer.db.execute(*statement).fetchall()

    def _transact(self, db: sqlite3.Connection, work: Callable[[], Any]) -> Any:
        """Run a transaction that counts itself; all of it happens, or nothing."""
        db.execute("BEGIN IMMEDIATE")
        try:
            result, number = work(), self._written + 1
            db.execute(*_meta("written", str(number)))
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        self._written = number
        self._mark.write(number)
        return result

    def _sync(self) -> None:
        """Wait until the write-ahead log is on the disk, while others go on writing it."""
        with explained(), suppress(FileNotFoundError):
            handle = os.open(f"{self._path}-wal", os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _count_rows(self) -> None:
        for table in _COUNTED:
            for owner, count in self._writer.db.execute(f"SELECT owner, count(*) FROM {table} GROUP BY owner"):
                self._totals[table, owner] = count

    def _move(self, table: str, owners: Iterable[str], by: int) -> None:
        for owner in owners:
            self._totals[table, owner] += by

    def _known_caveat(self) -> str:
        incident, moment = json.loads(self.meta("incident") or '["", 0]')
        return incident if time.time() - moment < _CAVEAT_SECONDS else ""


def _meta(key: str, value: str) -> Statement:
    return "INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (key, value, checksum("meta", (key, value)))


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    register(db)
    return db

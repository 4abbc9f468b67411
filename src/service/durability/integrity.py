"""Whether the file of a journal is whole, and what happens to one that is not: it is set aside, never overwritten."""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, final
from urllib.parse import quote

from ...errors import ServiceError
from .schema import COLUMNS, VERSION, checksum, is_whole, shape
from .storage import DAMAGED, problem_of

__all__ = ["Mark", "damage_of", "set_aside"]

_MAGIC: Final = b"SQLite format 3\0"
_FORMATS: Final = (1, 2)  # rollback journal, write-ahead log
_HEADER: Final = 100


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a journal's file; None: nothing is, or there is no file, or an empty one.

    Every page is read. The file is not changed, nor is its write-ahead log.

    Raises:
        ServiceError: it is a journal of another version.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or not header.startswith(_MAGIC) or not {header[18], header[19]} <= set(_FORMATS):
        return "it does not begin as a SQLite file does"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as db:
            return _damage(db, path)
    except UnicodeDecodeError:  # of SQLite's message, which quotes it
        return "the text of its tables is damaged"
    except sqlite3.Error as error:
        if problem_of(error) != DAMAGED:
            raise
        return str(error)


def _damage(db: sqlite3.Connection, path: Path) -> str | None:
    (version,), (tables,) = (
        db.execute(query).fetchone() for query in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if not tables:
        return None
    if not 1 <= version <= VERSION:
        raise ServiceError(
            f"{path} is a journal of version {version}, and this server writes {VERSION}: serve from another folder"
        )
    # Beyond what `quick_check` looks at, an index that lacks a row would let an operation run a second time.
    for pragma in ("quick_check", "integrity_check"):
        (verdict,) = db.execute(f"PRAGMA {pragma}(1)").fetchone()
        if verdict != "ok":
            return str(verdict)
    columns = "type, name, tbl_name" + (", coalesce(sql, '')" if version == VERSION else "")
    there = set(db.execute(f"SELECT {columns} FROM sqlite_master"))
    if not shape(version) <= there or (version == VERSION and there != shape(version)):
        return f"its tables are not those of version {version}"
    return _damaged_meta(db) if version > 1 else None


def _damaged_meta(db: sqlite3.Connection) -> str | None:
    rows = db.execute(f"SELECT {', '.join(COLUMNS['meta'])}, checksum FROM meta").fetchall()
    whole = all(is_whole(checksum("meta", values), written) for *values, written in rows)
    return None if whole else "the entry that counts what was written has another checksum"


def set_aside(path: Path) -> Path:
    """Rename a journal and its write-ahead log to a name that nothing has; return that of the journal."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (f"{path.stem}.damaged-{moment}{extra}{path.suffix}" for extra in ("", *(f"-{i}" for i in range(1, 1000))))
    aside = next(place for name in names if not (place := path.with_name(name)).exists())
    os.rename(path, aside)
    for ending in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{ending}", f"{aside}{ending}")
    return aside


@final
class Mark:
    """How much was written to a journal, beside it: a journal that holds less has lost its end.

    A write-ahead log that was cut, or damaged, ends earlier for SQLite, and nothing in the file tells.

    Args:
        path: of the file; it is made by the first `write`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def read(self) -> int | None:
        """Return the number that was written last; None: there is none, or it is damaged."""
        try:
            number, written = self._path.read_bytes().split()
            return int(number) if _mark(int(number)) == number + b" " + written + b"\n" else None
        except (OSError, ValueError):
            return None

    def write(self, number: int) -> None:
        """Write a number; a disk that refuses it is not asked again until the next one."""
        with suppress(OSError):
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._file, _mark(number), 0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _mark(number: int) -> bytes:
    digits = b"%020d" % number
    return digits + b" %08x\n" % zlib.crc32(digits)

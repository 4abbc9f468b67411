"""What a disk refuses, said in words: it is full, it cannot be written, another server uses it, or what it holds is damaged."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ...errors import PullbackError, StorageError

__all__ = ["DAMAGED", "explained", "lock_folder", "problem_of", "storage_error"]

DAMAGED: Final = "damaged"
_FULL: Final = "full"
_READ_ONLY: Final = "read-only"
_BUSY: Final = "busy"
_FAILING: Final = "failing"
_SQLITE: Final = {
    sqlite3.SQLITE_FULL: _FULL,
    **dict.fromkeys((sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN), _READ_ONLY),
    **dict.fromkeys((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED), _BUSY),
    **dict.fromkeys((sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM), _FAILING),
}
_SYSTEM: Final = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _READ_ONLY),
}
_RUST: Final = {f"(os error {number})": problem for number, problem in _SYSTEM.items()}  # how safetensors says it
_AT_START: Final = {
    _FULL: "the disk of {folder} is full, and the service must write there: free some space, or serve from another disk",
    _READ_ONLY: "{folder} cannot be written by this user: make it writable, or serve from another folder",
    _BUSY: "another server uses {folder}: stop it, or serve from another folder",
    _FAILING: "the disk of {folder} fails ({error}): it may be full or broken; check it, or serve from another disk",
    DAMAGED: "the journal in {folder} is damaged ({error}): stop the server and start it again, which rebuilds it",
}
_LATER: Final = {
    _FULL: "the server's disk is full: nothing was changed; ask its operator to free some space, and send this again",
    _READ_ONLY: "the server's disk cannot be written any more: nothing was changed; ask its operator to make it writable",
    _BUSY: "another process uses the server's journal: nothing was changed; ask its operator to stop it",
    _FAILING: "the server's disk fails, or is full: nothing was changed; ask its operator to look at it",
    DAMAGED: "the server's journal is damaged: ask its operator to start it again, which rebuilds the journal from the "
    "checkpoints",
}


def problem_of(error: BaseException) -> str:
    """Return which of the problems of a disk an error is; everything that is none of them is damage."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        if code in (None, sqlite3.SQLITE_IOERR_SHORT_READ):
            return DAMAGED
        return _SQLITE.get(code & 0xFF, DAMAGED)
    if isinstance(error, OSError):
        return _SYSTEM.get(error.errno or 0, _FAILING)
    return next((problem for code, problem in _RUST.items() if code in str(error)), DAMAGED)


def storage_error(error: BaseException, folder: Path | None = None) -> StorageError:
    """Say an error of the disk in words.

    Args:
        error: of SQLite, of the system, or of safetensors.
        folder: is named to whoever starts a server; clients are told no paths.
    """
    messages = _LATER if folder is None else _AT_START
    return StorageError(messages[problem_of(error)].format(folder=folder, error=error))


@contextmanager
def explained(folder: Path | None = None) -> Iterator[None]:
    """Raise what the disk refuses as a `StorageError`; see `storage_error`."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # the last where SQLite's message quotes damaged text
        if isinstance(error, (PullbackError, sqlite3.ProgrammingError)):  # in words already; used after it was closed
            raise
        raise storage_error(error, folder) from error


def lock_folder(folder: Path) -> sqlite3.Connection:
    """Keep other servers out of a folder until the returned connection is closed, or this process ends.

    Raises:
        StorageError: another server uses it, or it cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(folder / "held.sqlite", timeout=0.0, check_same_thread=False, isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            lock.close()
            raise storage_error(error, folder) from error
    return lock

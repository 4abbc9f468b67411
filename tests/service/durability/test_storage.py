"""A full disk, a folder that cannot be written, and another server: three messages, at the start and later."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from served.damage import KEYS, Client, serving_from
from servers import Direct, tiny_models

from pullback.backends import TorchBackend
from pullback.errors import StorageError
from pullback.service.durability.answers import Failure
from pullback.service.durability.journal import Journal
from pullback.service.durability.storage import lock_folder, storage_error

FULL, READ_ONLY, ANOTHER, FAILING = "is full", "cannot be written", "another server", "fails"
NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be somebody whom permissions bind: root is not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let every file of this process end there, as on a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("used", [False, True])
def test_a_folder_that_cannot_be_written(public: Path, used: bool) -> None:
    """By permissions; whether a server has been there or not."""
    folder = public / "checkpoints"
    folder.mkdir()
    if used:
        lock_folder(folder).close()
        Journal(folder / "journal.sqlite").close()
    for path in (*folder.iterdir(), folder):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    refused = pytest.raises(StorageError, match=f"checkpoints {READ_ONLY} by this user")
    with unprivileged(), refused, closing(lock_folder(folder)):
        Journal(folder / "journal.sqlite")
    os.chmod(folder, 0o755)


def test_a_folder_that_cannot_be_made(public: Path) -> None:
    """The same words."""
    os.chmod(public, 0o555)
    with unprivileged(), pytest.raises(StorageError, match=READ_ONLY):
        lock_folder(public / "checkpoints")


def test_another_server(tmp_path: Path) -> None:
    """Other words."""
    held = lock_folder(tmp_path)
    with pytest.raises(StorageError, match=ANOTHER):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()


def test_a_disk_without_room_at_the_start(tmp_path: Path) -> None:
    """A journal cannot be made where a file ends after one page; with room, it can."""
    with files_of_at_most(4096), pytest.raises(StorageError, match="may be full"):
        Journal(tmp_path / "journal.sqlite")
    Journal(tmp_path / "journal.sqlite").close()


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, FULL), (errno.EROFS, READ_ONLY), (errno.EIO, FAILING)])
def test_errors_of_the_system(tmp_path: Path, number: int, words: str) -> None:
    """To who starts a server with the folder, to clients without."""
    error = OSError(number, os.strerror(number), str(tmp_path))
    assert words in str(storage_error(error, tmp_path))
    assert str(tmp_path) in str(storage_error(error, tmp_path))
    assert words in str(storage_error(error)) or "fails, or is full" in str(storage_error(error))
    assert str(tmp_path) not in str(storage_error(error))


def test_the_error_of_safetensors(tmp_path: Path) -> None:
    """It has no number, only a text."""
    with files_of_at_most(4096), pytest.raises(SafetensorError) as refused:
        save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    assert FULL in str(storage_error(refused.value))


def full(journal: Journal) -> Callable[[], None]:
    """Let SQLite have no more pages; return what gives them back."""
    db = journal.database._writer.db
    for _ in range(200):  # until what it has is used
        try:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count={pages}").fetchall()
            journal.add_session(os.urandom(200).hex(), "filler", "x" * 2000)
        except StorageError:
            return lambda: db.execute("PRAGMA max_page_count=1000000").close()
    raise AssertionError("it did not fill")


def read_only(journal: Journal) -> Callable[[], None]:
    """Let SQLite refuse to write, as on a disk that was made read-only; return what undoes it."""
    db = journal.database._writer.db
    db.execute("PRAGMA query_only=1").close()
    return lambda: db.execute("PRAGMA query_only=0").close()


@pytest.mark.parametrize(("refuse", "words"), [(full, FULL), (read_only, READ_ONLY)])
def test_a_disk_that_refuses_later(tmp_path: Path, refuse: Callable[[Journal], Callable[[], None]], words: str) -> None:
    """A request says so, is not to be sent again at once, and names no folder; with room again, all is as before."""

    async def used() -> None:
        async with serving_from(tmp_path, tiny_models(tmp_path).base) as (http, service):
            client = Client(http, KEYS[0])
            undo, large = refuse(service.journal), {"user_metadata": {"a": "x" * 9000}}
            response = await http.post("create_session", json=large, headers={"x-api-key": KEYS[0]})
            assert response.status_code == 507
            assert response.headers["x-should-retry"] == "false"
            assert words in response.json()["detail"]
            assert str(tmp_path) not in response.text
            undo()
            assert (await client.post("create_session", large))["type"] == "create_session"

    asyncio.run(used())


def test_a_checkpoint_that_finds_no_room(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation fails by the server's fault, in words; the model trains on, and the same name can be saved later."""
    direct.read(direct.gradient(1))

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/folder/of/the/server")

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "save_state", no_room)
        answer = direct.read(direct.call("save_weights", 2, path="one"))
    assert isinstance(answer, Failure)
    assert answer.category == "server"
    assert FULL in answer.text
    assert "/a/folder" not in answer.text
    assert direct.read(direct.call("optim_step", 3))["metrics"]["grad_norm"] > 0
    assert direct.read(direct.call("save_weights", 4, path="one"))["type"] == "save_weights"

"""Journals of older versions, deleted ones and damaged ones: nothing that lies beside them is lost."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from servers import MODEL, Direct

from pullback.cli import main
from pullback.errors import StorageError
from pullback.service.durability.answers import Failure
from pullback.service.durability.descriptions import Description
from pullback.service.durability.journal import Journal
from pullback.service.durability.storage import lock_folder

GOLDEN = Path(__file__).parents[2] / "golden" / "journal_v1"
ONE = f"tinker://{MODEL}/weights/one"
TWO = f"tinker://{MODEL}/sampler_weights/two"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a service of version 1."""
    return Path(shutil.copytree(GOLDEN / "served", tmp_path / "served"))


def said() -> dict[str, Any]:
    """What the code of that version said of it."""
    return dict(json.loads((GOLDEN / "said.json").read_text()))


def part(row: Any, of: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in of}


def plain(answer: Any) -> Any:
    """An answer in the form of ``said.json``."""
    if isinstance(answer, bytes):
        return {"protobuf": base64.b64encode(answer).decode()}
    return {"failure": [answer.text, answer.category]} if isinstance(answer, Failure) else answer


def test_a_journal_of_version_1_says_what_it_said(old: Path) -> None:
    """Every row and every answer; opened again, it is one of this version, and nothing is missing."""
    for _ in range(2):
        journal, expected = Journal(old / "journal.sqlite"), said()
        for row in expected["sessions"]:
            assert part(journal.session(row["id"]), row) == row
        assert part(journal.models("me")[0], expected["models"][0]) == expected["models"][0]
        assert journal.sampler("sess:sample:0") == {**expected["sampler"], "fingerprint": None, "expires": None}
        rows = journal.checkpoints("me")
        assert [part(row, one) for row, one in zip(rows, expected["checkpoints"], strict=True)] == expected[
            "checkpoints"
        ]
        for one in expected["operations"].values():
            operation = journal.operation(one["request"])
            assert operation is not None
            accepted = {key: getattr(operation.accepted, key) for key in one.keys() - {"expired", "answer"}}
            assert accepted | {"expired": operation.expired, "answer": plain(operation.answer)} == one
        assert [one.request for one in journal.unfinished()] == ["req-open"]
        assert journal.caveat == ""
        journal.close()


def test_a_service_goes_on_from_version_1(old: Path) -> None:
    """What was open is lost, in words; its checkpoint is loaded; from now on the folders say whose they are."""
    direct = Direct(old)
    assert "weights/one (all up to seq_id 4)" in direct.read("req-open").text
    given = {"session_id": "sess", "model_seq_id": 1, "path": ONE, "optimizer": True}
    assert direct.read(direct.operations.load_weights("me", b"", given))["model_id"] == "sess:train:1"
    described = Description.read(direct.models.checkpoints.place(ONE))
    assert described is not None
    assert (described.owner, described.number, described.metadata) == ("me", 4, '{"b": "c"}')
    direct.sequencer.close()


def trained(direct: Direct) -> None:
    """A gradient, a step, and a checkpoint of each kind."""
    direct.read(direct.gradient(1))
    direct.read(direct.call("optim_step", 2))
    direct.read(direct.call("save_weights", 3, path="one", user_metadata={"b": "c"}, ttl_seconds=9999))
    direct.read(direct.call("save_for_sampler", 4, path="two"))


def removed(folder: Path) -> None:
    for path in folder.glob("journal.sqlite*"):
        path.unlink()


def overwritten(folder: Path) -> None:
    (folder / "journal.sqlite").write_bytes(b"no journal at all" * 100)
    (folder / "journal.sqlite-wal").unlink(missing_ok=True)


@pytest.mark.parametrize("damage", [removed, overwritten])
def test_checkpoints_outlive_their_journal(direct: Direct, damage: Any, caplog: Any) -> None:
    """The next server has every checkpoint with all that was known of it, says what happened, and trains on from it."""
    trained(direct)
    before = {"models": direct.journal.models("me"), "checkpoints": direct.journal.checkpoints("me")}
    folder = direct.models.checkpoints.root
    direct.journal.close()
    damage(folder)
    with caplog.at_level(logging.WARNING):
        again = direct.restart()
    assert "made anew from the checkpoints" in caplog.text
    assert {"models": again.journal.models("me"), "checkpoints": again.journal.checkpoints("me")} == before
    assert again.journal.total("checkpoints", "me") == 2
    answer = again.read(again.call("optim_step", 5))
    assert "weights/one (all up to seq_id 3)" in answer.text
    assert "made anew from the checkpoints" in answer.text
    again.journal.add_session("sess", "me", None)
    given = {"session_id": "sess", "model_seq_id": 1, "path": ONE, "optimizer": True}
    assert again.read(again.operations.load_weights("me", b"", given))["type"] == "load_weights"
    again.sequencer.close()


def test_a_damaged_journal_is_kept(direct: Direct) -> None:
    """Under another name each time, byte for byte, with its log."""
    folder, contents = direct.models.checkpoints.root, []
    direct.journal.close()
    for i in range(3):
        contents.append(b"damaged %d" % i * 100)
        (folder / "journal.sqlite").write_bytes(contents[-1])
        (folder / "journal.sqlite-wal").write_bytes(b"log" + contents[-1])
        Journal(folder / "journal.sqlite").close()
    kept = {path.name: path.read_bytes() for path in folder.glob("journal.damaged-*")}
    assert sorted(kept.values()) == sorted([*contents, *(b"log" + content for content in contents)])


def test_a_damaged_entry_of_a_checkpoint_is_made_anew(direct: Direct) -> None:
    """The folder says what the entry said; nobody else's entry is touched."""
    trained(direct)
    before, path = direct.journal.checkpoints("me"), direct.models.checkpoints.root / "journal.sqlite"
    direct.journal.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE checkpoints SET metadata = '\"another\"' WHERE uri = ?", (ONE,))
        db.execute("UPDATE models SET metadata = '\"another\"'")
    db.close()
    journal = Journal(path)
    with pytest.raises(StorageError, match="damaged: its checksum"):
        journal.checkpoint(ONE)
    journal.close()
    again = direct.restart()
    assert again.journal.checkpoints("me") == before
    assert json.loads(again.journal.models("me")[0]["metadata"]) is None
    again.sequencer.close()


def test_the_answer_of_a_damaged_entry_says_so(direct: Direct) -> None:
    """A failure of the server's: as an error of HTTP, it would be asked for again and again."""
    request = direct.gradient(1)
    direct.read(request)
    direct.journal.database.write(("UPDATE operations SET answer = zeroblob(9) WHERE request = ?", (request,)))
    answer = direct.sequencer.result("me", request).result(timeout=120)
    assert isinstance(answer, Failure)
    assert answer.category == "server"
    assert "damaged" in answer.text


def test_what_says_no_owner_is_kept_aside(old: Path, caplog: Any, capsys: Any) -> None:
    """Checkpoints of version 1 without their journal: in no listing, named in a warning, and given to whom an operator says."""
    removed(old)
    with caplog.at_level(logging.WARNING):
        direct = Direct(old)
    assert "2 checkpoints do not say whose they are" in caplog.text
    assert ONE in caplog.text
    assert direct.journal.checkpoints("") == []
    direct.sequencer.close()
    direct.journal.close()
    digest = hashlib.sha256(b"tml-key").hexdigest()
    assert main(["serve", "--checkpoints", str(old), "--adopt", digest]) == 0
    assert ONE in capsys.readouterr().out
    assert main(["serve", "--checkpoints", str(old), "--adopt", "everybody"]) == 0
    assert "every checkpoint says whose it is" in capsys.readouterr().out
    journal = Journal(old / "journal.sqlite")
    assert {row["uri"] for row in journal.checkpoints(digest[:32])} == {ONE, TWO}
    assert json.loads(journal.models(digest[:32])[0]["lora"])["rank"] == 2
    assert "which seq_id is not known" in (journal.last_checkpoint(MODEL) or "")
    journal.close()
    lock_folder(old).close()


def test_nothing_is_said_of_a_folder_that_is_new(tmp_path: Path) -> None:
    """Nor of one that was closed and opened again."""
    for _ in range(2):
        journal = Journal(tmp_path / "journal.sqlite")
        journal.add_session("sess", "me", None)
        assert journal.caveat == ""
        journal.close()


@pytest.mark.parametrize("number", ["1 2", "x", "00000000000000000099 00000000"])
def test_a_damaged_mark_is_no_loss(tmp_path: Path, number: str) -> None:
    """What counts the entries is not believed without its checksum."""
    Journal(tmp_path / "journal.sqlite").close()
    (tmp_path / "journal.mark").write_text(number)
    journal = Journal(tmp_path / "journal.sqlite")
    assert journal.caveat == ""
    journal.close()


def test_a_lost_end_is_told_once_and_remembered(tmp_path: Path) -> None:
    """By every later server for a week; what is written after it is not lost again."""
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    shutil.copy(path, tmp_path / "before")
    journal = Journal(path)
    journal.add_session("sess", "me", None)
    journal.close()
    shutil.copy(tmp_path / "before", path)
    for _ in range(2):
        journal = Journal(path)
        assert "lost its end" in journal.caveat
        assert journal.session("sess") is None
        journal.close()

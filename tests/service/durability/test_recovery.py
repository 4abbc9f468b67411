"""What a server that was killed between two writes has left, and what the next one makes of it."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from servers import MODEL, Direct, tiny_models

from pullback.errors import ServiceError
from pullback.service import serving
from pullback.service.durability.answers import Failure
from pullback.service.durability.journal import Journal
from pullback.service.durability.storage import lock_folder


def train(direct: Direct, number: int) -> int:
    """A gradient and a step; return the next number."""
    direct.read(direct.gradient(number))
    direct.read(direct.call("optim_step", number + 1))
    return number + 2


def lost(direct: Direct, number: int) -> str:
    """What an operation of the model says after a restart."""
    answer = direct.read(direct.call("optim_step", number))
    assert isinstance(answer, Failure)
    return answer.text


def killed_before(direct: Direct, monkeypatch: pytest.MonkeyPatch, *writes: str) -> None:
    """From now on these are not written, as if the process had ended before them."""
    for name in writes:
        monkeypatch.setattr(Journal, name, lambda self, *given: None)


def weights(direct: Direct, name: str) -> Any:
    folder = direct.models.checkpoints.folder(MODEL, "weights") / name
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("writes", [("finish",), ("add_checkpoint", "finish")])
def test_a_save_that_is_whole_is_done(
    direct: Direct, overwrite: bool, writes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint took its place, before anybody was told: the next server tells, and knows what it holds."""
    number = train(direct, 1)
    if overwrite:
        direct.read(direct.call("save_weights", number, path="one"))
        number = train(direct, number + 1)
    with monkeypatch.context() as patch:
        killed_before(direct, patch, *writes)
        request = direct.call("save_weights", number, path="one", overwrite=overwrite, user_metadata={"a": "b"})
        direct.read(request)
    again = direct.restart()
    assert again.read(request) == {"path": f"tinker://{MODEL}/weights/one", "type": "save_weights"}
    assert f"weights/one (all up to seq_id {number})" in lost(again, number + 1)
    (row,) = again.journal.checkpoints("me")
    assert json.loads(row["metadata"]) == {"a": "b"}
    again.sequencer.close()


def test_a_save_that_did_not_take_its_place_is_undone(direct: Direct) -> None:
    """Killed between the two renames of an overwritten checkpoint: the old one is back, whole; leftovers are gone."""
    number = train(direct, 1)
    direct.read(direct.call("save_weights", number, path="one"))
    before, folder = weights(direct, "one"), direct.models.checkpoints.folder(MODEL, "weights")
    os.rename(folder / "one", folder / ".one.old")
    (folder / ".one.abcdefgh").mkdir()
    (folder / ".two.gone").mkdir()
    again = direct.restart()
    after = weights(again, "one")
    assert [path.name for path in folder.iterdir()] == ["one"]
    assert after[1] == before[1]
    assert all((after[0][key] == tensor).all() for key, tensor in before[0].items())
    assert f"weights/one (all up to seq_id {number})" in lost(again, number + 1)
    again.sequencer.close()


def test_a_save_that_had_not_begun_is_lost(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before anything was written: the old checkpoint is what is named, with what it holds."""
    number = train(direct, 1)
    direct.read(direct.call("save_weights", number, path="one"))
    after = train(direct, number + 1)
    with monkeypatch.context() as patch:
        killed_before(direct, patch, "add_checkpoint", "finish")
        patch.setattr(direct.models, "save", lambda *given: None)
        request = direct.call("save_weights", after, path="one", overwrite=True)
        direct.sequencer.result("me", request).result(timeout=120)
    again = direct.restart()
    answer = again.read(request)
    assert isinstance(answer, Failure)
    assert f"weights/one (all up to seq_id {number})" in answer.text
    again.sequencer.close()


def test_a_checkpoint_that_is_gone_is_not_named(direct: Direct) -> None:
    """Killed between deleting a checkpoint and noting it: it is in no list, and no message names it."""
    number = train(direct, 1)
    direct.read(direct.call("save_weights", number, path="one"))
    direct.models.checkpoints.delete(f"tinker://{MODEL}/weights/one")
    again = direct.restart()
    assert again.journal.checkpoints("me") == []
    assert "there is no durable checkpoint" in lost(again, number + 1)
    again.sequencer.close()


def test_a_model_without_checkpoints_names_its_origin(direct: Direct) -> None:
    """What was made from a checkpoint and not saved since goes back to that."""
    direct.read(direct.call("save_weights", train(direct, 1), path="one"))
    uri = f"tinker://{MODEL}/weights/one"
    given = {"session_id": "sess", "model_seq_id": 1, "path": uri, "optimizer": True}
    direct.read(direct.operations.load_weights("me", json.dumps(given).encode(), given))
    again = direct.restart()
    step = {"model_id": "sess:train:1", "seq_id": 1, "adam_params": {}}
    answer = again.read(again.operations.training.optim_step("me", b"", step))
    assert f"{uri} (which it was made from)" in answer.text
    again.sequencer.close()


def test_a_creation_that_was_lost_can_be_asked_again(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted and not done, and lost nothing else, says so."""
    given = {"session_id": "sess", "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}}
    with monkeypatch.context() as patch:
        killed_before(direct, patch, "finish")
        request = direct.operations.create_model("me", b"", given)
        direct.sequencer.result("me", request).result(timeout=120)
    again = direct.restart()
    assert "ask again" in again.read(request).text
    again.sequencer.close()


def test_one_server_a_folder(tmp_path: Path) -> None:
    """A second server on the same folder is refused while the first runs, and not after."""
    with (
        serving(tiny_models(tmp_path)),
        pytest.raises(ServiceError, match="another server"),
        serving(tiny_models(tmp_path)),
    ):
        pass
    lock_folder(tmp_path).close()


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    """It is named, and left as it is."""
    Journal(tmp_path / "journal.sqlite").close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(ServiceError, match="version 99"):
        Journal(tmp_path / "journal.sqlite")

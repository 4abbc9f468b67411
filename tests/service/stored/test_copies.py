"""Copies of checkpoints: another run's name for the same files."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from servers import SDK_WARNINGS, adapter, copies, rest_client, served, trained_client

from pullback.errors import CheckpointError, PullbackError, ServiceError

# The SDK asks for an adapter on the output projection too, which this base ties to its embeddings; peft remarks on that.
pytestmark = [*SDK_WARNINGS, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")]


@pytest.fixture
def trained(service: Any) -> Any:
    return trained_client(service)


def test_a_copy_outlives_its_source(service: Any, trained: Any, url: str, models: Any) -> None:
    """The SDK copies into a project: the bytes are shared, and training goes on from the copy when the source is gone."""
    client = rest_client(url)
    path = trained.save_state("source").result().path
    copied = client.copy_weights(path, "archive").result()
    assert copied != path
    files = [models.checkpoints.locate(uri) / "adapter_model.safetensors" for uri in (path, copied)]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    run = client.get_training_run(copied.split("/")[2]).result()
    assert run.user_metadata == {"copy_of": path, "destination_project_id": "archive"}
    client.delete_checkpoint_from_tinker_path(path).result()
    other = service.create_training_client_from_state(copied).result()
    torch.testing.assert_close(adapter(served(models, other)), adapter(served(models, trained)), atol=0, rtol=0)


def test_the_same_request_copies_once(direct: Any) -> None:
    """By its key, before and after a restart; another key, or a run that is named, is another copy."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    body = {"source_path": source, "destination_project_id": "p"}
    first = copies(direct).copy("me", body, "key")
    assert copies(direct).copy("me", body, "key") == first
    assert copies(direct.restart()).copy("me", body, "key") == first
    assert copies(direct).copy("me", body, "other") != first
    named = {"source_path": source, "session_id": "sess", "model_seq_id": 7}
    assert copies(direct).copy("me", named, "") == {"tinker_path": "tinker://sess:train:7/weights/one"}
    with pytest.raises(ServiceError, match="another model"):
        copies(direct).copy("me", {**named, "model_seq_id": 0}, "")
    answer = direct.read(
        direct.operations.save_weights("me", b"x", {"model_id": "sess:train:7", "seq_id": 1, "path": "x"})
    )
    assert "not trained on" in answer.text
    assert len(direct.journal.checkpoints("me")) == 4


def test_a_project_with_half_of_a_character(direct: Any) -> None:
    """It is refused before anything is linked."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    with pytest.raises(ServiceError, match="destination_project_id holds half of a character"):
        copies(direct).copy("me", {"source_path": source, "destination_project_id": "\ud800"}, "key")
    assert len(list(direct.models.checkpoints.all())) == 1


def test_a_copy_counts_as_what_its_key_holds(direct: Any) -> None:
    """With room for two checkpoints one can be copied; a byte less, and it cannot, and nothing is left of it."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    body = {"source_path": source, "destination_project_id": "p"}
    size = direct.models.checkpoints.size(source)
    for quota, good in ((2 * size - 1, False), (2 * size, True)):
        direct.operations.limits = replace(direct.operations.limits, disk_per_key=quota)
        if good:
            assert copies(direct).copy("me", body, "key")
        else:
            with pytest.raises(ServiceError, match="bytes of checkpoints"):
                copies(direct).copy("me", body, "key")
            assert len(direct.journal.checkpoints("me")) == 1


def test_a_copy_expires_by_its_own_time(direct: Any) -> None:
    """An hour after it was made, whatever its source says; without a time it is kept."""
    made = direct.models.checkpoints.clock()
    source = direct.read(direct.call("save_weights", 1, path="one", ttl_seconds=7200))["path"]
    for seconds in (None, 3600):
        body = {"source_path": source, "destination_project_id": "p", "ttl_seconds": seconds}
        uri = copies(direct).copy("me", body, "")["tinker_path"]
        expires = direct.journal.checkpoint(uri)["expires"]
        assert expires is None if seconds is None else made + 3600 <= expires < made + 7200
    assert made + 7200 <= direct.journal.checkpoint(source)["expires"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "you", "there is no checkpoint"),
    ({"source_path": "tinker://sess:train:0/weights/two"}, "me", "there is no checkpoint"),
    ({"source_path": "/etc"}, "me", "no checkpoint of this server"),
    ({"destination_project_id": None}, "me", "destination_project_id"),
    ({"weights_access_token": "t"}, "me", "weights_access_token"),
    ({"ttl_seconds": 3599}, "me", "ttl_seconds must be"),
    ({"session_id": "other", "model_seq_id": 1}, "me", "no session"),
]


@pytest.mark.parametrize(("change", "owner", "words"), REFUSED)
def test_what_cannot_be_copied_is_refused(direct: Any, change: dict[str, Any], owner: str, words: str) -> None:
    """In words, and nothing is left on the disk or in the journal."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    before = sorted(direct.models.checkpoints.root.rglob("*"))
    with pytest.raises(PullbackError, match=words):
        copies(direct).copy(owner, {"source_path": source, "destination_project_id": "p", **change}, "key")
    assert len(direct.journal.checkpoints("me")) == 1
    assert not direct.journal.models("you")
    assert sorted(direct.models.checkpoints.root.rglob("*")) == before


def test_a_copy_that_fails_half_way_leaves_nothing(direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, after the first file; the next attempt succeeds."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    body, link, calls = {"source_path": source, "destination_project_id": "p"}, os.link, []

    def full(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) > 1:
            raise FileNotFoundError(2, "No such file or directory")
        link(*given, **options)

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(CheckpointError, match="ask again"):
        copies(direct).copy("me", body, "key")
    monkeypatch.undo()
    assert len(direct.journal.checkpoints("me")) == 1
    assert not list(direct.models.checkpoints.root.glob("*/weights/.*"))
    copied = copies(direct).copy("me", body, "key")["tinker_path"]
    names = [{file.name for file in direct.models.checkpoints.locate(uri).iterdir()} for uri in (source, copied)]
    assert names[0] == names[1] >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"}

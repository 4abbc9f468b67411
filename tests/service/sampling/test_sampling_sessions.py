"""A sampling session goes on with the weights that it was made on, or says why not: overwritten, another base, out of time."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from servers import MODEL, Direct

from pullback.errors import ServiceError, StorageError
from pullback.service import Base, ServedModels
from pullback.service.durability.answers import Failure
from pullback.service.durability.integrity import damage_of
from pullback.service.durability.journal import Journal
from pullback.service.limits import Limits

GOLDEN = Path(__file__).parents[2] / "golden" / "journal_v2"
TWO = f"tinker://{MODEL}/sampler_weights/two"
HOUR = 3600
SLOW = pytest.mark.slow
BASE = {"base_model": "tiny"}


def made(direct: Direct, number: int, **on: Any) -> str:
    """A session on a checkpoint, or on the base."""
    session = f"sess:sample:{number}"
    direct.operations.samplers.create(session, "me", on or BASE)
    return session


def sampled(direct: Direct, session: str) -> Any:
    """The answer to a request for two tokens and the scores of its prompt."""
    params = {"max_tokens": 2, "seed": 1, "stop": []}
    body = {"sampling_session_id": session, "prompt": {"chunks": [{"tokens": [1, 2, 3]}]}, "prompt_logprobs": True}
    accepted = direct.operations.samplers.sample("me", json.dumps(body).encode(), {**body, "sampling_params": params})
    return direct.read(accepted["request_id"])


def stepped(direct: Direct, number: int) -> int:
    direct.read(direct.gradient(number))
    direct.read(direct.call("optim_step", number + 1))
    return number + 2


@pytest.fixture
def saved(direct: Direct) -> Direct:
    """A service with one checkpoint to sample from, number 1."""
    direct.read(direct.call("save_for_sampler", 1, path="two"))
    return direct


@pytest.mark.parametrize("restarted", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("overwritten", [pytest.param(False, marks=SLOW), True])
def test_a_checkpoint_that_is_overwritten(saved: Direct, overwritten: bool, restarted: bool) -> None:
    """From memory the session goes on as before; when it has left memory it is refused; a new one has the new weights."""
    session = made(saved, 0, model_path=TWO)
    before = sampled(saved, session)
    number = stepped(saved, 2)
    if overwritten:
        saved.read(saved.call("save_for_sampler", number, path="two", overwrite=True))
    assert sampled(saved, session) == before
    direct = saved.restart() if restarted else saved
    direct.operations.samplers.forget("sess")
    after = sampled(direct, session)
    if not overwritten:
        assert after == before
    else:
        assert isinstance(after, Failure)
        assert after.category == "user"
        assert f"{TWO} was overwritten after sampling session {session!r} was made from it" in after.text
        with pytest.raises(ServiceError, match="another request"):
            direct.operations.samplers.create(session, "me", BASE)
        made(direct, 0, model_path=TWO)  # the same request again is the same session
        assert isinstance(sampled(direct, session), Failure)
        new = sampled(direct, made(direct, 1, model_path=TWO))
        assert isinstance(new, bytes)
        assert new != before
    direct.sequencer.close()


@SLOW
def test_it_is_bound_when_it_is_made(saved: Direct) -> None:
    """Also where nothing was sampled before the checkpoint was overwritten; by the same weights it is not."""
    session = made(saved, 0, model_path=TWO)
    saved.read(saved.call("save_for_sampler", 2, path="two", overwrite=True))
    assert isinstance(sampled(saved, session), bytes)
    saved.operations.samplers.forget("sess")
    saved.read(saved.call("save_for_sampler", stepped(saved, 3), path="two", overwrite=True))
    assert "was overwritten" in sampled(saved, session).text


def test_what_another_session_has_in_memory_is_not_gone(saved: Direct) -> None:
    """A session that has left memory goes on with its weights while another one has them, though the path holds others."""
    first, second = (made(saved, number, model_path=TWO) for number in (0, 1))
    before = sampled(saved, first)
    assert sampled(saved, second) == before
    saved.read(saved.call("save_for_sampler", stepped(saved, 2), path="two", overwrite=True))
    saved.operations.samplers._loaded.drop(first)
    assert saved.operations.samplers.names() == [second]
    assert sampled(saved, first) == before
    for session in (first, second):
        saved.operations.samplers._loaded.drop(session)
    assert "are not in memory any more" in sampled(saved, first).text


def on_base(folder: Path, scale: float) -> Direct:
    """A service on a base of the same shapes."""
    model: Any = tiny_llama(torch.float32).model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(scale)
    return Direct(folder, ServedModels(Base("tiny", model, None, {"token_budget": 64}), folder))


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=SLOW), 1.5])
def test_a_base_that_is_another_one(direct: Direct, tmp_path: Path, scale: float) -> None:
    """After a restart on it the session is refused, before and after a model was made; a new one is not."""
    session = made(direct, 0)
    before = sampled(direct, session)
    direct.sequencer.close()
    again = on_base(tmp_path, scale)
    for first in (True, False):
        after = sampled(again, session)
        if scale == 1.0:
            assert after == before
        else:
            assert isinstance(after, Failure)
            assert (after.category, "another base model" in after.text) == ("user", True)
            assert isinstance(sampled(again, made(again, 5)), bytes)
        body = {"session_id": "sess", "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}}
        if first:
            again.read(again.operations.create_model("me", b"", body))
    again.sequencer.close()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a service of version 2: on the base, on a checkpoint, on one overwritten later, and in memory."""
    return Path(shutil.copytree(GOLDEN / "served", tmp_path / "old"))


def test_a_journal_of_version_2_says_what_it_said(old: Path) -> None:
    """Every row, twice: it is then one of this version, and nothing counts as lost."""
    said = json.loads((GOLDEN / "said.json").read_text())
    for _ in range(2):
        assert damage_of(old / "journal.sqlite") is None
        journal = Journal(old / "journal.sqlite")
        assert journal.sessions("me") == said["sessions"]
        assert journal.models("me") == said["models"]
        assert journal.checkpoints("me") == said["checkpoints"]
        found = [journal.sampler(row["id"]) for row in said["samplers"]]
        assert found == [{**row, "fingerprint": None, "expires": None} for row in said["samplers"]]
        assert [one.request for one in journal.unfinished()] == ["req-open"]
        assert journal.caveat == ""
        assert int(journal.database.meta("written") or 0) > int(said["written"])
        journal.close()


def test_sessions_of_version_2_go_on(old: Path) -> None:
    """But for the one whose checkpoint is younger than it; from now on the others are bound too."""
    direct = Direct(old)
    answers = [sampled(direct, f"sess:sample:{i}") for i in range(4)]
    assert [isinstance(answer, Failure) for answer in answers] == [False, False, True, True]
    assert "three was overwritten after" in answers[2].text
    assert "in memory only" in answers[3].text
    for i in range(2):
        assert (direct.journal.sampler(f"sess:sample:{i}") or {})["fingerprint"]
    direct.sequencer.close()
    direct.journal.close()
    other = on_base(old, 1.5)
    assert "another base model" in sampled(other, "sess:sample:0").text
    other.sequencer.close()


def test_a_damaged_row_of_version_2_is_not_believed(old: Path) -> None:
    """Nor made whole by the migration; the rows beside it are."""
    with sqlite3.connect(old / "journal.sqlite") as db:
        db.execute("UPDATE samplers SET path = 'tinker://sess:train:0/weights/lost' WHERE id = 'sess:sample:1'")
    db.close()
    journal = Journal(old / "journal.sqlite")
    with pytest.raises(StorageError, match=r"samplers\) is damaged"):
        journal.sampler("sess:sample:1")
    assert journal.sampler("sess:sample:0")
    journal.close()


def test_a_journal_of_version_2_without_a_table_is_damaged(old: Path) -> None:
    """It is set aside, and made anew."""
    with sqlite3.connect(old / "journal.sqlite") as db:
        db.execute("DROP TABLE saves")
    db.close()
    assert damage_of(old / "journal.sqlite") == "its tables are not those of version 2"


@pytest.mark.parametrize("seconds", [HOUR, pytest.param(None, marks=SLOW)])
def test_weights_in_memory_have_a_time_to_live(direct: Direct, seconds: int | None) -> None:
    """They are sampled from until it ends, then refused in words and let go; those without one stay."""
    number, now = stepped(direct, 1), [time.time()]
    direct.models.checkpoints.clock = lambda: now[0]
    given = {"sampling_session_seq_id": 0, "ttl_seconds": seconds}
    session = direct.read(direct.call("save_for_sampler", number, **given))["sampling_session_id"]
    longer = direct.read(direct.call("save_for_sampler", number + 1, sampling_session_seq_id=10))["sampling_session_id"]
    now[0] += HOUR - 1
    direct.operations.sweep()
    before = sampled(direct, session)
    assert isinstance(before, bytes)
    now[0] += 1
    after = sampled(direct, session)
    direct.operations.sweep()
    assert direct.operations.samplers.names() == ([longer] if seconds else [longer, session])
    assert isinstance(after, Failure) == bool(seconds)
    if seconds:
        assert (after.category, f"the time to live of sampling session {session!r} ended at" in after.text) == (
            "user",
            True,
        )
        assert sampled(direct, session) == after
    assert isinstance(sampled(direct, longer), bytes)


@SLOW
def test_a_time_to_live_that_is_none(direct: Direct) -> None:
    """The save fails before a sampler is made."""
    answer = direct.read(direct.call("save_for_sampler", 1, sampling_session_seq_id=0, ttl_seconds=5))
    assert isinstance(answer, Failure)
    assert "3600 (an hour)" in answer.text
    assert direct.operations.samplers.names() == []


@SLOW
def test_what_has_left_memory_is_forgotten_by_the_sweep(tmp_path: Path) -> None:
    """A session with a time to live that made room for another is no longer counted."""
    direct = Direct(tmp_path, limits=Limits(samplers=1))
    direct.start()
    for number in (1, 2):
        direct.read(direct.call("save_for_sampler", number, sampling_session_seq_id=number, ttl_seconds=HOUR))
    direct.operations.sweep()
    assert set(direct.operations.samplers._ends) == set(direct.operations.samplers.names()) == {"sess:sample:2"}
    direct.sequencer.close()

"""What one key may hold: less than the server has, and never what keeps others out."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import MODEL, Direct

from pullback.errors import BusyError
from pullback.service.durability.answers import Answer, Failure
from pullback.service.durability.journal import Journal
from pullback.service.limits import Limits
from pullback.service.queueing.sequencer import Sequencer
from pullback.service.quotas import Quota


def filled(quota: Quota, greedy: int) -> list[int]:
    """How much each of some greedy owners gets who ask in turn until all are refused."""
    held, refused = [0] * greedy, 0
    while refused < greedy:
        refused = 0
        for owner in range(greedy):
            if quota.refusal(held[owner], sum(held)) is None:
                held[owner] += 1
            else:
                refused += 1
    return held


@given(total=st.integers(1, 300), greedy=st.integers(1, 12), each=st.none() | st.integers(1, 40), shared=st.booleans())
def test_there_is_room_for_whoever_comes_next(total: int, greedy: int, each: int | None, shared: bool) -> None:
    """Of n greedy owners of a shared server each gets an (n + 1)th, and so much is left; alone, one gets all."""
    held = filled(Quota("things", total, each, shared), greedy)
    assert sum(held) <= total
    assert each is None or max(held) <= each
    if each is None and shared and total > greedy:
        assert total - sum(held) >= total // (greedy + 1)
        assert all(abs(amount - total / (greedy + 1)) <= 1 for amount in held)
    if each is None and not shared:
        assert sum(held) == total


def test_a_refusal_names_its_quota() -> None:
    """Each bound is named on its far side, with what is held and what helps; on its near side nothing is said."""
    own = Quota("models", 32, 4, True, "unload one")
    assert own.refusal(3, 3) is None
    assert own.refusal(4, 4) == "this key holds 4 models, and its quota is 4; unload one"
    shared = Quota("models", 32, None, True, "unload one")
    assert shared.refusal(15, 16) is None
    words = "this key holds 16 models, and the 16 of 32 that are free are left for other keys; unload one"
    assert shared.refusal(16, 16) == words
    assert shared.refusal(16, 16, reserved=True) is None
    assert shared.refusal(0, 31) is None
    assert shared.refusal(0, 32) == "this server holds 32 models, and takes 32; unload one"


class Queue:
    """A sequencer on which owners fill queues; nothing runs until it is let go."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.sequencer, self.gate = Sequencer(Journal(folder / "journal.sqlite"), limits), threading.Event()
        self.sequencer.run(lambda: self.gate.wait(120))
        self.sent: list[tuple[str, str]] = []

    def send(self, owner: str, number: int) -> None:
        self.sequencer.open(f"{owner}:train:0")
        request = self.sequencer.submit(owner, f"{owner}:train:0", number, b"", "kind", dict)
        self.sent.append((owner, request))

    def fill(self, owner: str, first: int) -> tuple[int, str]:
        """Send until one is refused; return how many were accepted, and the refusal."""
        for count in range(200):
            try:
                self.send(owner, first + count)
            except BusyError as error:
                return count, str(error)
        raise AssertionError("nothing was refused")

    def end(self) -> list[Answer]:
        self.gate.set()
        found = [self.sequencer.result(*one).result(timeout=120) for one in self.sent]
        self.sequencer.close()
        return found


@pytest.fixture
def shared(tmp_path: Path) -> Queue:
    return Queue(tmp_path, Limits(queue=32, waiting=6, shared=True))


def test_a_number_that_never_comes_keeps_nobody_out(shared: Queue) -> None:
    """Behind it one key may have as many as its bound says; others go on, and all run when it comes."""
    count, words = shared.fill("greedy", 2)
    assert count == 6
    assert "6 operations that wait for a missing number, and its quota is 6; they run when it comes" in words
    shared.send("other", 1)
    shared.send("greedy", 1)  # it fills the gap
    assert shared.fill("greedy", 8)[0] == 9  # 7 are queued, 1 of another; half of the rest
    assert shared.end() == [{}] * 17


def test_without_the_bound_it_would(tmp_path: Path) -> None:
    """Negative control: with no bound of its own, what waits fills the queue, and others are turned away."""
    queue = Queue(tmp_path, Limits(queue=32, waiting=32))
    assert queue.fill("greedy", 2)[0] == 16  # never more than half of what a key may queue
    queue.send("greedy", 1)  # ... so that there is room for the missing number
    assert queue.fill("greedy", 18)[0] == 15
    with pytest.raises(BusyError, match="holds 32 operations that wait or run, and takes 32"):
        queue.send("other", 1)
    queue.end()


def test_a_missing_number_may_have_what_is_left_for_others(shared: Queue) -> None:
    """Three keys hold all that they may, and one waits for a number: that is accepted, what comes after it is not."""
    assert [shared.fill(owner, first)[0] for owner, first in (("a", 1), ("c", 2), ("b", 1))] == [16, 6, 5]
    with pytest.raises(BusyError, match=r"holds 6 operations .* the 5 of 32 that are free are left for other keys"):
        shared.send("c", 9)
    shared.send("c", 1)
    with pytest.raises(BusyError, match=r"holds 7 operations .* the 4 of 32 that are free are left for other keys"):
        shared.send("c", 8)
    assert shared.end() == [{}] * 28


def created(direct: Direct, owner: str, session: str, number: int) -> Any:
    """Create a model; return its answer."""
    if direct.journal.session_owner(session) is None:
        direct.journal.add_session(session, owner, None)
    body = {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 2}}
    request = direct.operations.create_model(owner, json.dumps(body).encode(), body)
    return direct.sequencer.result(owner, request).result(timeout=120)


def test_one_key_cannot_take_all_models(tmp_path: Path) -> None:
    """Half of them, while another key gets its first; unloading one makes room for another of the same key."""
    direct = Direct(tmp_path, limits=Limits(models=4, shared=True))
    answers = [created(direct, "greedy", "g", number) for number in range(3)]
    assert [isinstance(answer, Failure) for answer in answers] == [False, False, True]
    assert answers[2].text == (
        "this key holds 2 models, and the 2 of 4 that are free are left for other keys; unload one, finish its session, or "
        "try later"
    )
    assert answers[2].category == "user"
    assert created(direct, "other", "o", 0)["model_id"] == "o:train:0"
    body = {"model_id": "g:train:0"}
    request = direct.operations.unload("greedy", json.dumps(body).encode(), body)
    direct.sequencer.result("greedy", request).result(timeout=120)
    assert created(direct, "greedy", "g", 3)["model_id"] == "g:train:3"
    direct.sequencer.close()


def test_silent_sessions_make_room_the_own_ones_first(tmp_path: Path) -> None:
    """Where all sessions are silent, a key that is at its bound loses its own model, and another's stays."""
    direct = Direct(tmp_path, limits=Limits(models=8, models_per_key=1, shared=True, idle_seconds=0.0))
    for owner in ("a", "b"):
        created(direct, owner, owner, 0)
    assert created(direct, "b", "b2", 0)["model_id"] == "b2:train:0"
    assert sorted(direct.models.backends) == ["a:train:0", "b2:train:0"]
    direct.sequencer.close()


def test_others_make_no_room_for_who_has_all_it_may(tmp_path: Path) -> None:
    """A silent session of another key goes where the server is full, and stays where the key is at its own bound."""
    for limits, left in (
        (Limits(models=8, models_per_key=1), ["a:train:0", "b:train:0"]),
        (Limits(models=2), ["b2:train:0", "b:train:0"]),
    ):
        direct = Direct(tmp_path / str(limits.models), limits=limits)
        for owner in ("a", "b"):
            created(direct, owner, owner, 0)
        direct.operations.sessions._seen["a"] = -1e9
        answer = created(direct, "b", "b2", 0)
        assert sorted(direct.models.backends) == left
        assert isinstance(answer, Failure) == ("b2:train:0" not in left)
        direct.sequencer.close()


def saved(direct: Direct, number: int, name: str, **more: Any) -> Any:
    return direct.read(direct.call("save_weights", number, path=name, **more))


def test_bytes_on_disk_have_a_quota(tmp_path: Path) -> None:
    """At its bound a key may replace and delete, and what it deletes it may write again; the refusal writes nothing."""
    direct = Direct(tmp_path)
    direct.start()
    assert not isinstance(saved(direct, 1, "one"), Failure)
    size = direct.journal.stored_bytes("me")
    assert size == direct.journal.stored_bytes() == direct.models.checkpoints.size(f"tinker://{MODEL}/weights/one")
    direct.operations.limits = Limits(disk_per_key=size + 50)  # a time may have more digits
    refused = saved(direct, 2, "two")
    assert isinstance(refused, Failure)
    assert f"holds {size:,} bytes of checkpoints, and its quota is {size + 50:,}; delete those" in refused.text
    assert [folder.name for folder in direct.models.checkpoints.folder(MODEL, "weights").iterdir()] == ["one"]
    assert not isinstance(saved(direct, 3, "one", overwrite=True), Failure)
    direct.operations.limits = Limits(disk_per_key=2 * size + 50)
    assert not isinstance(saved(direct, 4, "two"), Failure)
    assert direct.journal.stored_bytes("somebody else") == 0
    direct.sequencer.close()


def test_no_key_may_store_more_than_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys share the disk, one that holds as much as is free leaves the rest to others; a full disk says so."""
    direct = Direct(tmp_path, limits=Limits(shared=True))
    direct.start()
    saved(direct, 1, "one")
    size = direct.journal.stored_bytes("me") + 50  # a time may have more digits
    for number, (free, words) in enumerate([(size, "are left for other keys"), (1, "and takes"), (4 * size, "")], 2):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        answer = saved(direct, number, f"at-{number}")
        assert isinstance(answer, Failure) == bool(words)
        assert not words or words in answer.text
    direct.sequencer.close()


def test_custom_losses_have_a_quota(tmp_path: Path) -> None:
    """A key may make as many as its bound says; those of a finished session are free again."""
    direct = Direct(tmp_path, limits=Limits(losses_per_key=2))
    made = [made_loss(direct, "one", number) for number in range(3)]
    assert [isinstance(answer, Failure) for answer in made] == [False, False, True]
    assert "holds 2 custom losses, and its quota is 2" in made[2].text
    direct.sequencer.run(lambda: direct.operations.finish("one"))
    assert made_loss(direct, "two", 0)["loss_id"] == "two:loss:0"
    direct.sequencer.close()


def made_loss(direct: Direct, session: str, number: int) -> Any:
    if direct.journal.session_owner(session) is None:
        direct.journal.add_session(session, "me", None)
    body = {"session_id": session, "custom_loss_seq_id": number, **LOSS}
    return direct.read(direct.operations.training.create_loss("me", json.dumps(body).encode(), body))


NODES: list[dict[str, Any]] = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []},
    {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
    {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "total"}, {"dict": {}}]}]},
]
LOSS = {
    "name": "total",
    "inputs": [{"name": "logprobs", "rank": 1}],
    "graph": {"format": 1, "nodes": NODES},
}

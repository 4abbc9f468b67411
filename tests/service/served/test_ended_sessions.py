"""What ends leaves nothing behind: sessions free all that they hold, and what waits hears of it."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from served.endless import EndlessWork
from served.gaps import Gaps
from servers import Direct, gradient_body, tiny_models

from pullback.backends import TorchBackend
from pullback.service.durability.answers import Failure
from pullback.service.limits import Limits
from pullback.service.queueing import queues
from pullback.service.queueing.sequencer import Sequencer
from pullback.service.served.sampler import Sampler
from pullback.service.wire.protobuf import decode_request

NODES: list[dict[str, Any]] = [
    {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []},
    {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
    {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "total"}, {"dict": {}}]}]},
]
LOSS = {"name": "total", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": NODES}}


class Sessions:
    """A service whose sessions come and go; what is counted is its own, whatever other services do in this process."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, limits: Limits | None = None) -> None:
        self.gaps, self.made = Gaps(patch), made_of(patch, TorchBackend, Sampler)
        self.direct, self.folder = Direct(folder, tiny_models(folder), limits or Limits()), folder
        self.opened = 0

    def ask(self, submit: Any, body: dict[str, Any]) -> str:
        return str(submit("me", json.dumps(body).encode(), body))

    def answer(self, submit: Any, body: dict[str, Any]) -> Any:
        return self.direct.read(self.ask(submit, body))

    def open(self, *, trains: bool) -> str:
        """Open a session with a loss and a model; if it trains, use all that a client can hold."""
        do, session = self.direct.operations, f"s{self.opened}"
        self.opened += 1
        self.direct.journal.add_session(session, "me", None)
        do.sessions.require("me", session)
        self.answer(do.training.create_loss, {"session_id": session, "custom_loss_seq_id": 0, **LOSS})
        if trains:
            lora = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
            model = self.answer(do.create_model, lora)["model_id"]
            body = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
            sampler = self.answer(do.save_for_sampler, body)["sampling_session_id"]
            prompt = {"prompt": {"chunks": [{"tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 2, "stop": []}}
            self.direct.read(do.samplers.sample("me", b"", {"sampling_session_id": sampler, **prompt})["request_id"])
            bad = do.training.gradient("me", decode_request(gradient_body(model, 2, "dpo", ("ref_logprobs",))))
            assert isinstance(self.direct.sequencer.result("me", bad).result(timeout=120), Failure)
            self.ask(do.training.optim_step, {"model_id": model, "seq_id": 9, "adam_params": {"learning_rate": 1e-2}})
        return session

    def finish(self, session: str) -> None:
        """Finish a session, and wait until it has been."""
        done = threading.Event()
        self.direct.sequencer.run(lambda: self.direct.operations.finish(session))
        self.direct.sequencer.run(done.set)
        assert done.wait(120)

    def held(self) -> dict[str, int]:
        """Count what a service holds for sessions."""
        do, sequencer = self.direct.operations, self.direct.sequencer
        return {
            "queues": len(sequencer._queues),
            "operations": sequencer.queued,
            "turns": sum(1 for _ in sequencer._turns),
            "timers": self.gaps.waiting,
            "losses": len(do.training._losses),
            "failures": len(do.training._acknowledgements),
            "sessions": len(do.sessions._seen),
            "samplers": len(do.samplers),
            "models": len(do.models.backends) + len(do.models.choices) + len(do.models._explicit),
            "graphs": len(do.training.graphs._entries) + len(do.training.graphs._records),
        }

    def close(self) -> None:
        self.direct.sequencer.close()

    def alive(self) -> int:
        """How many of the backends and samplers that were made meanwhile there are."""
        gc.collect()
        return len(self.made)


def made_of(patch: pytest.MonkeyPatch, *kinds: Any) -> WeakSet[Any]:
    """Return a set of the objects of these classes that are made from now on, while they live."""
    made: WeakSet[Any] = WeakSet()

    def noting(kind: Any) -> Any:
        create = kind.__init__

        def noted(self: Any, *given: Any, **named: Any) -> None:
            made.add(self)
            create(self, *given, **named)

        return noted

    for kind in kinds:
        patch.setattr(kind, "__init__", noting(kind))
    return made


def come_and_go(sessions: Sessions, count: int, every: int) -> None:
    for number in range(count):
        sessions.finish(sessions.open(trains=number % every == 0))


def test_finished_sessions_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many sessions as one likes the service holds what it held before the first; reasons are bounded."""
    monkeypatch.setattr(queues, "_REMEMBERED", 8)
    sessions = Sessions(tmp_path, monkeypatch)
    kept = sessions.open(trains=True)
    assert sessions.alive() == 2
    assert all(sessions.held()[what] for what in ("queues", "operations", "timers", "losses", "failures", "samplers"))
    sessions.finish(kept)
    come_and_go(sessions, 20, 5)
    assert set(sessions.held().values()) == {0}
    assert len(sessions.direct.sequencer._end_reasons) == 8
    assert sessions.alive() == 0
    sessions.close()


@pytest.mark.slow
def test_two_thousand_sessions_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with 2,000 sessions and the bound as it is."""
    sessions = Sessions(tmp_path, monkeypatch)
    come_and_go(sessions, 2000, 200)
    assert set(sessions.held().values()) == {0}
    assert len(sessions.direct.sequencer._end_reasons) == queues._REMEMBERED < 2000
    assert sessions.alive() == 0
    sessions.close()


def test_what_is_not_ended_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: sessions that are not ended hold queues and losses, and the counts say so."""
    monkeypatch.setattr("pullback.service.operations.Operations.finish", lambda self, session: None)
    sessions = Sessions(tmp_path, monkeypatch)
    come_and_go(sessions, 2, 1)
    found = sessions.held()
    assert (found["queues"], found["losses"], found["samplers"], found["timers"]) == (2, 2, 2, 2)
    sessions.close()


def test_silent_sessions_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session holds beside models and samplers goes when nothing was heard of it for an hour, its name after a day."""
    sessions = Sessions(tmp_path, monkeypatch, Limits(idle_seconds=3600.0))
    seen = sessions.direct.operations.sessions._seen
    for hours, losses, known in ((0.9, 1, 1), (1.1, 0, 1), (23.9, 0, 1), (24.1, 0, 0)):
        session = sessions.open(trains=False)
        seen[session] -= 3600.0 * hours
        sessions.direct.operations.sweep()
        held = sessions.held()
        assert (held["losses"], held["sessions"]) == (losses, known)
        sessions.finish(session)
        assert set(sessions.held().values()) == {0}
    sessions.close()


def test_what_waits_hears_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that wait for their turn, or for a number, fail by the reason at once, and so does what is asked later."""
    sessions, gate = Sessions(tmp_path, monkeypatch), threading.Event()
    session = sessions.open(trains=True)
    model, do = f"{session}:train:0", sessions.direct.operations
    sessions.direct.sequencer.run(lambda: gate.wait(120))
    sessions.direct.sequencer.run(lambda: do.finish(session))
    step = {"adam_params": {"learning_rate": 1e-2}, "model_id": model}
    sent = [sessions.ask(do.training.optim_step, {**step, "seq_id": number}) for number in (3, 4, 7)]
    other = {"session_id": session, "model_seq_id": 1, "base_model": "tiny", "lora_config": {"rank": 2}}
    sent.append(sessions.ask(do.create_model, other))
    gate.set()
    sent.append(sessions.ask(do.training.optim_step, {**step, "seq_id": 8}))
    sent.append(sessions.ask(do.create_model, {**other, "model_seq_id": 2}))
    answers = [sessions.direct.read(request) for request in sent]
    assert all(isinstance(answer, Failure) and "was finished by its client" in answer.text for answer in answers)
    assert {answer.category for answer in answers} == {"user"}
    sessions.close()


def test_a_model_that_ended_long_ago_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the reason is no longer remembered, the answer does not claim a restart; after one, it does."""
    monkeypatch.setattr(queues, "_REMEMBERED", 1)
    sessions = Sessions(tmp_path, monkeypatch)
    session = sessions.open(trains=True)
    sessions.finish(session)
    sessions.finish("another")
    step = {"model_id": f"{session}:train:0", "adam_params": {"learning_rate": 1e-2}}
    late = sessions.answer(sessions.direct.operations.training.optim_step, {**step, "seq_id": 20})
    assert "it was unloaded, or its session has ended" in late.text
    again = sessions.direct.restart()
    body = {**step, "seq_id": 21}
    lost = again.read(again.operations.training.optim_step("me", json.dumps(body).encode(), body))
    assert "the server was restarted" in lost.text
    again.sequencer.close()
    sessions.close()


def test_an_unordered_work_in_slices_ends_with_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in slices stops at its next pause when its session has ended, and nothing new of it is begun."""
    sessions, endless = Sessions(tmp_path, monkeypatch), EndlessWork()
    sequencer: Sequencer = sessions.direct.sequencer
    request = sequencer.submit("me", "s9:sample:0:asample", None, b"", "sample", endless, ordered=False)
    assert endless.begun.wait(120)
    sessions.finish("s9")
    answer = sessions.direct.read(request)
    assert isinstance(answer, Failure)
    assert "the session s9 was finished by its client" in answer.text
    assert endless.stopped == 1
    refused = sequencer.submit("me", "s9:sample:1:asample", None, b"", "sample", endless, ordered=False)
    assert sessions.direct.read(refused) == answer
    sessions.close()

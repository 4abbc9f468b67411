"""Each operation once, in its order, whatever the network or the process does."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served.gaps import Gaps
from servers import Direct

from pullback.errors import BusyError, ServiceError
from pullback.service.durability.answers import Failure
from pullback.service.durability.journal import Journal
from pullback.service.limits import Limits
from pullback.service.queueing.acknowledgements import Acknowledgements
from pullback.service.queueing.sequencer import Sequencer


def test_a_step_sent_before_a_failure_is_known_is_refused(direct: Direct) -> None:
    """Pipelined behind a gradient that fails, a step makes nothing; sent after the failure was delivered, it does."""
    good, bad = direct.gradient(1), direct.gradient(2, "dpo", ("ref_logprobs",))
    refused_step = direct.read(direct.call("optim_step", 3))
    assert isinstance(refused_step, Failure)
    assert "ref_logprobs" in refused_step.text
    assert isinstance(direct.read(bad), Failure)
    direct.read(good)
    assert direct.read(direct.call("optim_step", 4))["metrics"]["grad_norm"] > 0


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return Journal(tmp_path_factory.mktemp("order") / "journal.sqlite")


@given(order=st.permutations(range(5)), repeats=st.lists(st.integers(0, 4), max_size=4))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_and_repetition_do_not_matter(journal: Journal, order: list[int], repeats: list[int]) -> None:
    """Requests that arrive in any order, some of them twice, run once and by their numbers."""
    sequencer, name = Sequencer(journal), str(uuid.uuid4())  # new to the journal, also when an example runs again
    sequencer.open(name)
    ran: list[int] = []

    def submit(number: int, payload: bytes = b"") -> str:
        def work() -> dict[str, Any]:
            ran.append(number)
            return {"number": number}

        return sequencer.submit("me", name, number + 1, payload, "kind", work)

    first = {number: submit(number) for number in order}
    assert [submit(number) for number in repeats] == [first[number] for number in repeats]
    for number, request in first.items():
        for _ in range(2):  # a result survives being fetched twice
            assert sequencer.result("me", request).result(timeout=120) == {"number": number}
    assert ran == [0, 1, 2, 3, 4]
    with pytest.raises(ServiceError, match="another request"):
        submit(2, b"other")
    with pytest.raises(ServiceError, match="unknown request"):
        sequencer.result("you", first[0])
    with pytest.raises(ServiceError, match="never created"):
        sequencer.submit("me", "none", 1, b"", "kind", dict)
    sequencer.close()


def test_a_number_that_never_comes_wedges_nothing(gaps: Gaps, direct: Direct) -> None:
    """What waits behind a missing number fails after a while, the missing one too if it comes late; later ones run."""
    early = direct.gradient(2)
    step = direct.call("optim_step", 3)
    gaps.passed()
    for request in (early, step):
        answer = direct.read(request)
        assert isinstance(answer, Failure)
        assert "seq_id 1" in answer.text
    assert "given up" in direct.read(direct.gradient(1)).text
    direct.read(direct.gradient(4))
    assert direct.read(direct.call("optim_step", 5))["metrics"]["grad_norm"] > 0


def test_a_full_queue_says_so(journal: Journal) -> None:
    """Beyond the limit nothing is accepted, and the same request is accepted later."""
    sequencer, gate = Sequencer(journal, Limits(queue=2)), threading.Event()
    sequencer.open("full")

    def wait() -> dict[str, Any]:
        gate.wait(120)
        return {}

    accepted = [sequencer.submit("me", "full", n, b"", "kind", wait) for n in (1, 2)]
    with pytest.raises(BusyError, match="holds 2 operations that wait"):
        sequencer.submit("me", "full", 3, b"", "kind", wait)
    gate.set()
    for request in accepted:
        sequencer.result("me", request).result(timeout=120)
    while sequencer.queued:
        time.sleep(0.01)
    assert sequencer.submit("me", "full", 3, b"", "kind", wait)
    sequencer.close()


def test_a_restart_forgets_nothing_it_promised(direct: Direct) -> None:
    """Finished answers are still there; unfinished and new operations fail, naming the last checkpoint."""
    done = direct.gradient(1)
    answer = direct.read(done)
    saved = direct.read(direct.call("save_weights", 2, path="one"))["path"]
    waiting = direct.gradient(4)  # 3 has not come
    again = direct.restart()
    assert again.sequencer.result("me", done).result() == answer
    assert again.gradient(1) == done
    for request in (waiting, again.gradient(4), again.gradient(5), again.call("optim_step", 6)):
        lost = again.read(request)
        assert isinstance(lost, Failure)
        assert "restarted" in lost.text
        assert saved in lost.text
    given = {"session_id": "sess", "model_seq_id": 1, "path": saved, "optimizer": True}
    made = again.operations.load_weights("me", json.dumps(given).encode(), given)
    assert again.read(made)["model_id"] == "sess:train:1"
    again.sequencer.close()


def test_sampler_weights_outlive_a_restart_if_they_were_named(direct: Direct) -> None:
    """A session on a checkpoint goes on; one on weights in memory says that they are gone."""
    named = direct.read(direct.call("save_for_sampler", 1, path="s"))["path"]
    memory = direct.read(direct.call("save_for_sampler", 2, sampling_session_seq_id=0))["sampling_session_id"]
    direct.operations.samplers.create("sess:sample:1", "me", {"model_path": named})

    def sample(service: Direct, session: str) -> Any:
        body = {"sampling_session_id": session, "prompt": {"chunks": [{"tokens": [1, 2]}]}, "prompt_logprobs": True}
        body |= {"sampling_params": {"max_tokens": 3, "seed": 1, "stop": []}}
        return service.read(service.operations.samplers.sample("me", b"", body)["request_id"])

    before = [sample(direct, "sess:sample:1"), sample(direct, memory)]
    assert before[0] == before[1]
    again = direct.restart()
    assert sample(again, "sess:sample:1") == before[0]
    assert "in memory only" in sample(again, memory).text
    with pytest.raises(ServiceError, match="there is no"):
        again.operations.samplers.info("you", memory)
    again.sequencer.close()


PIPELINED = [("gradient", 1), ("broken", 2), ("step", 3), ("gradient", 4), ("step", 5)]


def in_order_of(direct: Direct, arrival: list[int]) -> list[Any]:
    """Send all that is in PIPELINED in this order, read nothing before the end; return the answers by number."""
    requests = {}
    for place in arrival:
        what, number = PIPELINED[place]
        if what == "step":
            requests[number] = direct.call("optim_step", number)
        else:
            requests[number] = direct.gradient(number, *(("dpo", ("ref_logprobs",)) if what == "broken" else ()))
    return [direct.read(requests[number]) for _, number in PIPELINED]


def steps_refused(answers: list[Any]) -> bool:
    return all(isinstance(answers[place], Failure) and "ref_logprobs" in answers[place].text for place in (2, 4))


@given(arrival=st.permutations(range(5)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_step_that_overtakes_is_as_blind(tmp_path: Path, arrival: list[int]) -> None:
    """A step before whose number a gradient failed unacknowledged makes nothing, also if the gradient arrives after it."""
    direct = Direct(tmp_path / str(uuid.uuid4()))
    direct.start()
    assert steps_refused(in_order_of(direct, arrival))
    assert direct.read(direct.call("optim_step", 6))["metrics"]["grad_norm"] > 0
    direct.sequencer.close()


def test_a_blind_step_would_be_noticed(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a service that looks only at what had arrived makes the step."""
    monkeypatch.setattr(Acknowledgements, "unacknowledged", lambda self, model, number, moment: [])
    assert not steps_refused(in_order_of(direct, [2, 0, 1, 3, 4]))


def test_what_was_read_twice_is_read(direct: Direct) -> None:
    """A failure that was read stays read when its request comes again late, or its answer is fetched again."""
    bad = direct.gradient(1, "dpo", ("ref_logprobs",))
    assert isinstance(direct.read(bad), Failure)
    assert direct.gradient(1, "dpo", ("ref_logprobs",)) == bad
    direct.read(direct.gradient(2))
    assert direct.read(direct.call("optim_step", 3))["metrics"]["grad_norm"] > 0
    assert direct.gradient(1, "dpo", ("ref_logprobs",)) == bad
    direct.gradient(4)
    assert direct.read(direct.call("optim_step", 5))["metrics"]["grad_norm"] > 0


def test_a_journal_that_cannot_be_written(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hears of it, each time it asks; nothing hangs."""

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", full)
        request = direct.gradient(1)
        for _ in range(2):
            answer = direct.read(request)
            assert isinstance(answer, Failure)
            assert "disk is full" in answer.text


def test_what_comes_after_the_end_says_so(direct: Direct) -> None:
    """An operation that was accepted before its session ended, and runs after, fails by the reason."""
    gate = threading.Event()
    direct.sequencer.run(gate.wait)
    direct.sequencer.run(lambda: direct.operations.finish("sess"))
    late = direct.gradient(1)
    gate.set()
    answer = direct.read(late)
    assert isinstance(answer, Failure)
    assert "was finished by its client" in answer.text

"""Each operation once, in its order, whatever the network or the process does."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import gradient_body, tiny_tenants

from pullback.errors import BusyError, ServiceError
from pullback.service.journal import Failure, Journal
from pullback.service.limits import Limits
from pullback.service.operations import Operations
from pullback.service.sequencer import Sequencer
from pullback.service.wire import decode_request

MODEL = "sess:train:0"


class Direct:
    """A service without its routes; `restart` is what remains of it after a kill."""

    def __init__(self, folder: Path, tenants: Any = None) -> None:
        self.tenants = tenants or tiny_tenants(folder)
        self.journal = Journal(folder / "journal.sqlite")
        self.sequencer = Sequencer(self.journal, gap_seconds=0.2)
        self.operations = Operations(self.tenants, self.journal, self.sequencer, Limits(), lambda what, amount: None)

    def restart(self) -> Direct:
        return Direct(self.tenants.checkpoints.root)

    def start(self) -> None:
        self.journal.add_session("sess", "me", None)
        given = {"session_id": "sess", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
        assert self.read(self.operations.create_model("me", json.dumps(given).encode(), given))["model_id"] == MODEL

    def read(self, request: str) -> Any:
        answer = self.sequencer.result("me", request).result(timeout=30)
        self.operations.delivered(request)
        return answer

    def gradient(self, seq_id: int, loss: str = "ppo", without: tuple[str, ...] = ()) -> str:
        return self.operations.gradient("me", decode_request(gradient_body(MODEL, seq_id, loss, without)))

    def call(self, verb: str, seq_id: int, **extra: Any) -> str:
        given = {"model_id": MODEL, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-2}, **extra}
        return str(getattr(self.operations, verb)("me", json.dumps(given).encode(), given))


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Direct]:
    found = Direct(tmp_path)
    found.start()
    yield found
    found.sequencer.close()


def test_a_step_sent_before_a_failure_is_known_is_refused(direct: Direct) -> None:
    """Pipelined behind a gradient that fails, a step makes nothing; sent after the failure was delivered, it does."""
    good, bad = direct.gradient(1), direct.gradient(2, "dpo", ("ref_logprobs",))
    blind = direct.read(direct.call("optim_step", 3))
    assert isinstance(blind, Failure)
    assert "ref_logprobs" in blind.text
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
            assert sequencer.result("me", request).result(timeout=10) == {"number": number}
    assert ran == [0, 1, 2, 3, 4]
    with pytest.raises(ServiceError, match="another request"):
        submit(2, b"other")
    with pytest.raises(ServiceError, match="unknown request"):
        sequencer.result("you", first[0])
    with pytest.raises(ServiceError, match="never created"):
        sequencer.submit("me", "none", 1, b"", "kind", dict)
    sequencer.close()


def test_a_number_that_never_comes_wedges_nothing(direct: Direct) -> None:
    """What waits behind a missing number fails after a while, the missing one too if it comes late; later ones run."""
    early = direct.gradient(2)
    step = direct.call("optim_step", 3)
    for request in (early, step):
        answer = direct.read(request)
        assert isinstance(answer, Failure)
        assert "seq_id 1" in answer.text
    assert "given up" in direct.read(direct.gradient(1)).text
    direct.read(direct.gradient(4))
    assert direct.read(direct.call("optim_step", 5))["metrics"]["grad_norm"] > 0


def test_a_full_queue_says_so(journal: Journal) -> None:
    """Beyond the limit nothing is accepted, and the same request is accepted later."""
    sequencer, gate = Sequencer(journal, max_queue=2), threading.Event()
    sequencer.open("full")

    def wait() -> dict[str, Any]:
        gate.wait(10)
        return {}

    accepted = [sequencer.submit("me", "full", n, b"", "kind", wait) for n in (1, 2)]
    with pytest.raises(BusyError, match="2 operations wait"):
        sequencer.submit("me", "full", 3, b"", "kind", wait)
    gate.set()
    for request in accepted:
        sequencer.result("me", request).result(timeout=10)
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

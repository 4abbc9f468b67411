"""A step is never made unknowingly without a gradient that failed, and never refused for a failure that is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served.gaps import Gaps
from servers import MODEL, Direct, gradient_body

from pullback.service.durability.answers import Failure
from pullback.service.queueing.acknowledgements import Acknowledgements
from pullback.service.wire.protobuf import decode_request

BROKEN = ("dpo", ("ref_logprobs",))


def refused(answer: Any) -> bool:
    """Whether this is the refusal of a step for a failed gradient; any other failure is an error of the test."""
    if isinstance(answer, Failure):
        assert "sent before that was known" in answer.text
        assert "ref_logprobs" in answer.text
    return isinstance(answer, Failure)


def weights(direct: Direct) -> torch.Tensor:
    backend = direct.models.backends[MODEL]
    return torch.cat([p.detach().flatten() for p in backend.model.parameters() if p.requires_grad])


def test_a_failure_that_nobody_reads_refuses_one_step(direct: Direct, tmp_path: Path) -> None:
    """The refusal tells of it: the next step is made, on the gradients that succeeded, as if there had been no other."""
    direct.gradient(1)
    direct.gradient(2, *BROKEN)  # its answer is never read
    assert refused(direct.read(direct.call("optim_step", 3)))
    assert direct.read(direct.call("optim_step", 4))["metrics"]["grad_norm"] > 0
    twin = Direct(tmp_path / "twin")
    twin.start()
    twin.gradient(1)
    twin.read(twin.call("optim_step", 2))
    assert torch.equal(weights(direct), weights(twin))
    twin.sequencer.close()


def test_a_refusal_that_nobody_reads_tells_nothing(direct: Direct) -> None:
    """Steps are refused until an answer that tells of the failure is read; it names how many there were."""
    direct.gradient(1, *BROKEN)
    direct.gradient(2, *BROKEN)
    unread = [direct.call("optim_step", number) for number in (3, 4)]
    answer = direct.read(direct.call("optim_step", 5))
    assert refused(answer)
    assert "seq_id 1" in answer.text
    assert "and 1 more" in answer.text
    direct.gradient(6)
    assert not refused(direct.read(direct.call("optim_step", 7)))
    assert all(refused(direct.read(request)) for request in unread)


def test_what_was_given_up_is_a_failure_too(gaps: Gaps, direct: Direct) -> None:
    """A gradient behind a number that never came was not run: the first step after it is refused, the next one made."""
    direct.gradient(2)
    behind = direct.gradient(3)
    gaps.passed()
    given_up = direct.sequencer.result("me", behind).result(timeout=120)  # the client does not read it
    assert isinstance(given_up, Failure)
    answer = direct.read(direct.call("optim_step", 4))
    assert isinstance(answer, Failure)
    assert "did not arrive" in answer.text
    direct.gradient(5)
    assert direct.read(direct.call("optim_step", 6))["metrics"]["grad_norm"] > 0


def test_an_answer_tells_of_what_had_failed_when_it_was_given(gaps: Gaps, direct: Direct) -> None:
    """A gradient that comes late, and is given up after a step was refused, is not told of by that step's answer."""
    waits = direct.gradient(2, *BROKEN)
    gaps.passed()
    assert isinstance(direct.sequencer.result("me", waits).result(timeout=120), Failure)
    first = direct.call("optim_step", 3)
    assert isinstance(direct.sequencer.result("me", first).result(timeout=120), Failure)
    direct.gradient(1)  # given up; nobody reads of it
    direct.read(first)
    second = direct.read(direct.call("optim_step", 4))
    assert isinstance(second, Failure)
    assert "seq_id 1" in second.text
    assert "more" not in second.text
    assert not isinstance(direct.read(direct.call("optim_step", 5)), Failure)
    assert len(direct.operations.training._acknowledgements) == 0


def test_a_restart_has_neither_gradients_nor_failures(direct: Direct) -> None:
    """Steps of the old model fail as lost; one that is made from its checkpoint steps at once."""
    saved = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    direct.sequencer.result("me", direct.gradient(2, *BROKEN)).result(timeout=120)
    again = direct.restart()
    for number in (3, 4):
        answer = again.read(again.call("optim_step", number))
        assert isinstance(answer, Failure)
        assert "restarted" in answer.text
    body = {"session_id": "sess", "model_seq_id": 1, "path": saved, "optimizer": True}
    made = again.read(again.operations.load_weights("me", json.dumps(body).encode(), body))["model_id"]
    again.operations.training.gradient("me", decode_request(gradient_body(made, 1, "ppo")))
    step = {"model_id": made, "seq_id": 2, "adam_params": {"learning_rate": 1e-2}}
    made_step = again.read(again.operations.training.optim_step("me", json.dumps(step).encode(), step))
    assert not isinstance(made_step, Failure), made_step
    again.sequencer.close()


ACTS = st.lists(st.one_of(st.sampled_from(["good", "bad", "step"]), st.integers(0, 9)), min_size=3, max_size=14)


class Oracle:
    """Which steps may be made, by what the client has read when it sends them."""

    def __init__(self) -> None:
        self.failures: set[int] = set()  # since the last step that was made
        self.tells: dict[int, set[int]] = {}  # number of an operation -> the failures that its answer tells of
        self.known: set[int] = set()

    def sends(self, what: str, number: int) -> bool:
        """Note an operation; return whether it fails."""
        unknown = self.failures - self.known
        if what == "bad":
            self.failures.add(number)
            self.tells[number] = {number}
        elif what == "step" and unknown:
            self.tells[number] = unknown
        elif what == "step":
            self.failures = set()
        return what == "bad" or (what == "step" and bool(unknown))

    def reads(self, number: int) -> None:
        self.known |= self.tells.get(number, set())


class Played:
    """A service on which sequences of acts follow each other."""

    def __init__(self, folder: Path) -> None:
        self.direct, self.number = Direct(folder), 0
        self.direct.start()

    def send(self, act: str) -> str:
        self.number += 1
        if act == "step":
            return self.direct.call("optim_step", self.number)
        return self.direct.gradient(self.number, *(BROKEN if act == "bad" else ()))

    def play(self, acts: list[Any]) -> tuple[list[bool], list[bool]]:
        """Send and read as told; return which operations failed, and which had to."""
        oracle, before = Oracle(), self.number
        requests: list[str] = []
        expected: list[bool] = []
        for act in acts:
            if isinstance(act, str):
                expected.append(oracle.sends(act, len(requests)))
                requests.append(self.send(act))
            elif requests:
                self.direct.read(requests[act % len(requests)])
                oracle.reads(act % len(requests))
        assert self.number == before + len(requests)
        failed = [isinstance(self.direct.read(request), Failure) for request in requests]
        assert not isinstance(self.direct.read(self.send("step")), Failure)  # all is known: the next ones begin anew
        return failed, expected


@pytest.fixture(scope="module")
def service_of_acts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    found = Played(tmp_path_factory.mktemp("acts"))
    yield found
    found.direct.sequencer.close()


@given(acts=ACTS)
@settings(max_examples=15, deadline=None)
def test_a_step_is_made_if_all_failures_are_known(service_of_acts: Played, acts: list[Any]) -> None:
    """Whatever is sent and read in whatever order, a step is refused exactly where it would be made unknowingly."""
    found, expected = service_of_acts.play(acts)
    assert found == expected


def test_a_service_that_is_told_by_gradients_only_is_caught(
    service_of_acts: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: if a refusal told nothing, steps would be refused for ever."""
    monkeypatch.setattr(Acknowledgements, "refused", lambda self, model, request, number: None)
    found, expected = service_of_acts.play(["bad", "step", 1, "step"])
    assert (found, expected) == ([True, True, True], [True, True, False])

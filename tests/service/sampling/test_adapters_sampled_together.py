"""Clients with adapters of their own are sampled together: in the forwards of one, and each as if alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from helpers import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from served.sampling_service import Forwards, Sampling
from servers import MODEL

from pullback.backends import SamplingParams, TorchBackend
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.datums import ModelInput
from pullback.service.durability.answers import Failure
from pullback.service.served import sampler as sampler_module
from pullback.service.served.sampler import Sampler

pytestmark = pytest.mark.slow
CLIENTS = 8
TOKENS = 20


class Clients(Sampling):
    """Sampling sessions on the adapter of one model, each frozen after another step of its training."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.steps, self.owners = 0, [f"key{i}" for i in range(CLIENTS)]
        self.sessions = [self.frozen(owner) for owner in self.owners]
        self.mine = [self.added("me", sampler_of(self, session)) for session in self.sessions]

    def train(self) -> str:
        """Send a step that changes the adapter much; return the id of its answer."""
        self.steps += 2
        self.direct.gradient(self.steps - 1, "cross_entropy")
        return self.direct.call("optim_step", self.steps, adam_params={"learning_rate": 0.3})

    def frozen(self, owner: str) -> str:
        """Train, and return a session of this owner on the weights as they are then."""
        self.direct.read(self.train())
        return self.added(owner, self.direct.models.sampler(MODEL))

    def added(self, owner: str, sampler: Sampler) -> str:
        """Return a session of this owner."""
        self.calls += 1
        session = f"{owner}:sample:{self.calls}"
        self.samplers.add(session, owner, sampler)
        return session

    def at_once(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[list[list[int]]]:
        let_go = self.held()
        sent = [self.ask(session, **one) for session, one in asked]
        let_go.set()
        return [self.tokens(*one) for one in sent]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    found = Clients(tmp_path_factory.mktemp("clients"))
    yield found
    found.direct.sequencer.close()


def sampler_of(clients: Clients, session: str) -> Sampler:
    return clients.samplers._sampler(session.split(":")[0], session)


ASKED = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 6),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 2**40),
    }
)


@given(asked=st.lists(st.tuples(st.integers(-1, CLIENTS - 1), ASKED), min_size=2, max_size=3))
@settings(deadline=None)
def test_clients_get_what_each_gets_alone(clients: Clients, asked: list[tuple[int, dict[str, Any]]]) -> None:
    """In fp64 the tokens that a backend draws on the same weights, the base's among them; -1 is the base."""
    sessions = [*clients.sessions, clients.base]
    found = clients.at_once([(sessions[i], one) for i, one in asked])
    for (i, one), tokens in zip(asked, found, strict=True):
        sampler = sampler_of(clients, sessions[i])
        alone = Sampler(sampler.model, 0, ContinuousBatch(sampler.model))
        assert tokens == drawn(alone, one)


def drawn(sampler: Sampler, one: dict[str, Any]) -> list[list[int]]:
    params = {name: value for name, value in one.items() if name not in ("prompt", "n")}
    work = sampler.complete(ModelInput.from_ints(one["prompt"]), one["n"], SamplingParams(**params, stop=[]))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return [rollout.tokens for rollout in end.value]


def test_eight_adapters_take_the_forwards_of_one(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all prompts, and one for each further token of all; sessions on the base are among them."""
    clients.at_once([(clients.base, {"prompt": [1], "max_tokens": 1})])  # what a token takes is known after the first
    forwards = Forwards(monkeypatch)
    asked: dict[str, Any] = {"prompt": [3, 4, 5], "max_tokens": TOKENS}
    found = clients.at_once([(session, asked) for session in [*clients.mine, clients.base]])
    assert all(len(row) == TOKENS for rows in found for row in rows)
    assert forwards.count == TOKENS
    assert len({id(sampler_of(clients, session).batch) for session in clients.mine}) == 1


def test_other_keys_enter_a_batch_that_runs(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key's request enters at its own turn: a forward for its prompt, and no turns of its own for its tokens."""
    monkeypatch.setattr(sampler_module, "_SLICE_SECONDS", 0.0)
    forwards = Forwards(monkeypatch)
    asked: dict[str, Any] = {"prompt": [3, 4, 5], "max_tokens": 100}
    found = clients.at_once([(session, asked) for session in clients.sessions])
    assert all(len(row) == 100 for rows in found for row in rows)
    assert forwards.count <= 2 * 100 < 100 * CLIENTS


def test_training_never_changes_an_answer(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on the model whose weights are sampled run in the middle of the answer, which keeps the weights it began with."""
    monkeypatch.setattr(sampler_module, "_SLICE_SECONDS", 0.0)
    session, other = clients.frozen("me"), clients.sessions[0]
    asked: dict[str, Any] = {"prompt": [3, 4], "max_tokens": 50, "n": 2, "seed": 5}
    (before,) = clients.at_once([(session, asked)])
    events = list[str]()
    _note(monkeypatch, ContinuousBatch, "advance", events)
    _note(monkeypatch, TorchBackend, "optim_step", events)
    let_go = clients.held()
    sent = [clients.ask(one, **asked) for one in (session, other)]
    stepped = [clients.train() for _ in range(3)]
    let_go.set()
    assert clients.tokens(*sent[0]) == before
    clients.tokens(*sent[1])
    assert not any(isinstance(clients.direct.read(request), Failure) for request in stepped)
    steps = [i for i, event in enumerate(events) if event == "optim_step"]
    assert len(steps) == 3
    assert "advance" in events[: steps[0]]
    assert "advance" in events[steps[-1] :]
    (after,) = clients.at_once([(clients.frozen("me"), asked)])
    assert after != before


def _note(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, events: list[str]) -> None:
    right = getattr(owner, name)

    def noted(*given: Any, **named: Any) -> Any:
        events.append(name)
        return right(*given, **named)

    monkeypatch.setattr(owner, name, noted)


def test_an_adapter_on_the_head_has_a_batch_of_its_own(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be added row by row; its client is answered all the same, as by its own model."""
    body = {"session_id": "sess", "model_seq_id": 1, "base_model": "tiny"}
    body["lora_config"] = {"rank": 2, "train_unembed": True}
    clients.direct.read(clients.direct.operations.create_model("me", json.dumps(body).encode(), body))
    own = clients.direct.models.sampler("sess:train:1")
    session = clients.added("me", own)
    assert own.batch is not sampler_of(clients, clients.base).batch
    asked: dict[str, Any] = {"prompt": [9, 8, 9], "n": 1, "max_tokens": TOKENS, "seed": 3}
    alone = drawn(Sampler(own.model, 0, ContinuousBatch(own.model)), asked)
    forwards = Forwards(monkeypatch)
    assert clients.at_once([(session, asked), (clients.mine[0], asked)])[0] == alone
    assert forwards.count == 2 * TOKENS

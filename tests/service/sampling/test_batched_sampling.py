"""Samples of many clients on the same weights are decoded together, beside what others train, and as if alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from served.sampling_service import Forwards, Sampling, Steps

from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.service.durability.answers import Failure

CONTEXT = 128


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampling]:
    found = Sampling(tmp_path_factory.mktemp("sampling"))
    yield found
    found.direct.sequencer.close()


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 9),
        "temperature": st.sampled_from([0.0, 0.6, 1.0]),
        "top_k": st.sampled_from([-1, 4]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "seed": st.integers(0, 2**40),
    }
)


@given(requests=st.lists(REQUESTS, min_size=1, max_size=6))
@settings(deadline=None)
def test_requests_together_are_as_alone(sampling: Sampling, requests: list[dict[str, Any]]) -> None:
    """In fp64, whoever asks: the same seeds give the same tokens when all are sent at once as one after another."""
    sessions = [sampling.base, sampling.session("other")]
    alone = [sampling.tokens(*sampling.ask(sampling.base, **one)) for one in requests]
    let_go = sampling.held()
    sent = [sampling.ask(sessions[i % 2], **one) for i, one in enumerate(requests)]
    let_go.set()
    assert [sampling.tokens(*one) for one in sent] == alone


def test_many_requests_take_the_steps_of_one(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sessions on the same weights."""
    steps = Steps(monkeypatch)
    sessions = [sampling.base, sampling.session("me"), sampling.session("me")]
    let_go = sampling.held()
    sent = [sampling.ask(sessions[i % 3], [1 + i % 5], max_tokens=20) for i in range(12)]
    let_go.set()
    assert all(len(row) == 20 for one in sent for row in sampling.tokens(*one))
    assert steps.count == 20


def test_others_work_runs_between_slices(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training call that comes while another key's hundreds of completions are drawn ends before them."""
    begun, ended = threading.Event(), []
    advance = ContinuousBatch.advance

    def noted(batch: ContinuousBatch) -> None:
        begun.set()
        advance(batch)

    monkeypatch.setattr(ContinuousBatch, "advance", noted)
    owner, heavy = sampling.ask(sampling.session("greedy"), [1, 2], n=300, max_tokens=20)
    sampling.direct.sequencer.result(owner, heavy).add_done_callback(lambda _: ended.append("heavy"))
    assert begun.wait(timeout=120)
    light = sampling.direct.gradient(1)
    sampling.direct.sequencer.result("me", light).add_done_callback(lambda _: ended.append("light"))
    small = sampling.ask(sampling.base, [5], max_tokens=2)
    sampling.direct.sequencer.result(*small).add_done_callback(lambda _: ended.append("small"))
    assert len(sampling.tokens(owner, heavy)) == 300
    assert ended == ["light", "small", "heavy"]


def test_rewritten_weights_are_sampled_by_new_sessions(sampling: Sampling) -> None:
    """Sessions share weights, not names: one that is open keeps what it has when its checkpoint is written anew."""
    direct = sampling.direct
    path = direct.read(direct.call("save_for_sampler", 2, path="again"))["path"]
    old = sampling.session("me", path)
    asked: dict[str, Any] = {"prompt": [4, 5], "max_tokens": 20, "seed": 1}
    first = sampling.tokens(*sampling.ask(old, **asked))
    for number in (3, 5):
        direct.read(direct.gradient(number, "cross_entropy"))
        direct.read(direct.call("optim_step", number + 1, adam_params={"learning_rate": 0.5}))
    direct.read(direct.call("save_for_sampler", 7, path="again", overwrite=True))
    new = sampling.session("me", path)
    assert sampling.tokens(*sampling.ask(new, **asked)) != first
    assert sampling.tokens(*sampling.ask(old, **asked)) == first


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": CONTEXT}, "context of 128 tokens"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
    ({"max_tokens": True}, "max_tokens must be a whole number"),
    ({"max_tokens": 10**30}, "max_tokens must be a whole number"),
    ({"max_tokens": 10**9}, "takes at most 4000000 tokens"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": -1}, "temperature must be finite"),
    ({"temperature": 10**400}, "temperature must be a number"),
    ({"top_k": 0}, "top_k must be positive"),
    ({"top_k": 10**20}, "top_k must be a whole number"),
    ({"top_p": 0.0}, "top_p must be in"),
    ({"top_p": [1]}, "top_p must be a number"),
    ({"seed": "1"}, "seed must be a whole number"),
    ({"stop": [VOCAB, 1]}, f"stop has [{VOCAB}], outside the vocabulary of {VOCAB}: no completion would end there"),
    ({"stop": ["x"] * 65}, "at most 64 strings"),
    ({"stop": ["x" * 513]}, "of 512 characters"),
    ({"n": 1025}, "samples 1 to 1024"),
    ({"prompt": []}, "is empty"),
    ({"prompt": [VOCAB]}, "outside the vocabulary"),
    ({"topk_prompt_logprobs": VOCAB + 1}, f"vocabulary has {VOCAB}"),
    ({"target_prompt_logprobs": {"data": [VOCAB], "dtype": "int64", "shape": [1, 1]}}, "names token"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD)
def test_what_cannot_be_sampled_is_refused_before_work(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], words: str
) -> None:
    """As the user's error, in words, and without a forward of the model."""
    forwards = Forwards(monkeypatch)
    good: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 2}
    assert sampling.tokens(*sampling.ask(sampling.base, **good))
    assert forwards.count
    forwards.count = 0
    answer = sampling.read(*sampling.ask(sampling.base, **{**good, **wrong}))
    assert isinstance(answer, Failure), answer
    assert answer.category == "user"
    assert words in answer.text
    assert not forwards.count


@pytest.mark.parametrize("extra", [{"temperature": 1e-300}, {"temperature": 1e38}, {"top_p": 1e-300}, {"seed": -1}])
def test_extreme_parameters_are_sampled(sampling: Sampling, extra: dict[str, Any]) -> None:
    """A temperature next to 0 is greedy, a large one uniform; nothing overflows."""
    asked: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 6, "prompt_alt_tokens_k": 3}
    found = sampling.tokens(*sampling.ask(sampling.base, **asked, **extra))
    if extra in ({"temperature": 1e-300}, {"top_p": 1e-300}):
        assert found == sampling.tokens(*sampling.ask(sampling.base, **asked, temperature=0))


def test_a_finished_session_stops_decoding(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests fail at their next pause, and their rows leave the batch; another key's go on."""
    session, begun = sampling.session("leaving"), threading.Event()
    batch = sampling.samplers._sampler("leaving", session).batch
    advance = ContinuousBatch.advance

    def noted(batch: ContinuousBatch) -> None:
        advance(batch)
        begun.set()

    monkeypatch.setattr(ContinuousBatch, "advance", noted)
    owner, request = sampling.ask(session, [1], n=1000, max_tokens=100)
    assert begun.wait(timeout=120)
    sampling.direct.sequencer.end(f"{session}:asample", "its session was finished")
    answer = sampling.read(owner, request)
    assert isinstance(answer, Failure)
    assert "finished" in answer.text
    assert len(sampling.tokens(*sampling.ask(sampling.base, [2], max_tokens=3))[0]) == 3
    assert batch.alive == 0
    assert not batch.busy

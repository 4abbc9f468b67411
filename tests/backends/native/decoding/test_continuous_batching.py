"""Requests that are decoded together give what each gives alone, whenever they come, and share the batch fairly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends import SamplingParams
from pullback.backends.native import HFModel
from pullback.backends.native.decoding import cached, lane
from pullback.backends.native.decoding.agreement import cache_agrees
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.backends.native.decoding.lane import LaneLimits
from pullback.backends.native.decoding.requests import GenerationRequest
from pullback.backends.native.decoding.sampling import rollouts_of
from pullback.datums import ModelInput
from pullback.errors import InvalidDatumsError
from pullback.testing import TinyLM

VOCAB = 17
KINDS = ("plain", "cached", "windowed", "LoRA")


@functools.cache
def model_of(kind: str) -> Any:
    """Return a model in fp64; ``windowed`` has layers that see the 8 tokens before, and others."""
    if kind == "plain":
        return TinyLM()
    if kind != "windowed":
        return tiny_llama(torch.float64, lora=2 if kind == "LoRA" else None)
    pytest.importorskip("transformers", reason="caches are transformers' own (extra hf)")
    from pullback.testing.models import zoo

    return HFModel(zoo.build("gemma3_text", window=8).double())


@dataclass(frozen=True)
class Asked:
    """A request, and the step before which it comes."""

    prompt: tuple[int, ...]
    n: int
    params: SamplingParams
    seed: int
    owner: str
    step: int
    banned: int | None  # a completion ends with its second token of this kind

    def ends(self) -> Callable[[Sequence[int]], bool] | None:
        return None if self.banned is None else lambda tokens: list(tokens).count(self.banned or 0) >= 2

    def add(self, batch: ContinuousBatch) -> GenerationRequest:
        prompt = ModelInput.from_ints(list(self.prompt))
        return batch.add(prompt, self.n, self.params, self.seed, ends=self.ends(), owner=self.owner)


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    stop=st.sampled_from([[], [2], [3, 4, 5]]),
)
TOKENS = st.integers(1, VOCAB - 1)
PROMPTS = st.one_of(st.sampled_from([(5, 6, 7), (5,)]), st.lists(TOKENS, min_size=1, max_size=20).map(tuple))
ASKED = st.builds(
    Asked,
    prompt=PROMPTS,
    n=st.integers(1, 3),
    params=PARAMS,
    seed=st.integers(0, 2**40),
    owner=st.sampled_from(["a", "b", "c"]),
    step=st.integers(0, 8),
    banned=st.one_of(st.none(), TOKENS),
)
LIMITS = st.builds(
    LaneLimits,
    rows=st.integers(1, 9),
    cells=st.integers(20, 300),
    memory=st.sampled_from([None, 5e4]),
    prefill_tokens=st.integers(1, 60),
    share=st.integers(1, 3),
)


def decode(model: Any, asked: Sequence[Asked], limits: LaneLimits) -> list[GenerationRequest]:
    """Decode requests together, each from its step on."""
    batch, step, found = ContinuousBatch(model, limits), 0, dict[int, GenerationRequest]()
    while len(found) < len(asked) or batch.busy:
        for i, one in enumerate(asked):
            if one.step == step:
                found[i] = one.add(batch)
        batch.advance()
        step += 1
        assert batch.alive <= limits.rows
    return [found[i] for i in range(len(asked))]


def answers(request: GenerationRequest) -> tuple[list[list[int]], list[float]]:
    """All tokens, and all log-probs in a row."""
    rollouts = rollouts_of(request, 0, 0)
    return [r.tokens for r in rollouts], [x for r in rollouts for x in [*r.logprobs, *(r.sampler_logprobs or [])]]


@given(kind=st.sampled_from(KINDS), asked=st.lists(ASKED, min_size=1, max_size=4), limits=LIMITS)
def test_together_is_as_alone(kind: str, asked: list[Asked], limits: LaneLimits) -> None:
    """In fp64 every request draws the tokens that it draws alone, whatever comes when and has to wait or leave meanwhile."""
    model = model_of(kind)
    for one, request in zip(asked, decode(model, asked, limits), strict=True):
        (alone,) = decode(model, [one], LaneLimits())
        tokens, scores = answers(request)
        own_tokens, own_scores = answers(alone)
        assert tokens == own_tokens
        assert scores == pytest.approx(own_scores, abs=1e-5)  # transformers' norms compute in fp32
        assert all(1 <= len(row) <= one.params.max_tokens for row in tokens)
        assert len(tokens) == one.n


def test_the_first_completions_do_not_depend_on_how_many_there_are() -> None:
    """Row i's random numbers follow from the seed and i; different rows and seeds draw differently."""
    asked = [Asked((5, 6, 7), n, SamplingParams(max_tokens=12, stop=[]), 3, "", 0, None) for n in (1, 4)]
    (one,), four = (answers(request)[0] for request in decode(model_of("cached"), asked, LaneLimits()))
    assert four[0] == one
    assert len({tuple(row) for row in four}) == 4


MISTAKES: dict[str, tuple[str, Any]] = {
    "padding at the end": ("_last", lambda x, depth, dim: torch.nn.functional.pad(x, (0, 0, 0, depth - x.shape[2]))),
    "windows that are not told": ("_declare", lambda layer, width: None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_cache_that_rows_cannot_enter_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what goes wrong where a row enters late gives other logits than a forward, and is found first."""
    name, wrong = MISTAKES[mistake]
    right = getattr(cached, name)
    pytest.importorskip("transformers", reason="caches are transformers' own (extra hf)")
    from pullback.testing.models import zoo

    assert cache_agrees(HFModel(zoo.build("gemma3_text", window=8)))
    if name == "_last":
        monkeypatch.setattr(cached, name, lambda x, n, dim: wrong(x, n, dim) if n > x.shape[dim] else right(x, n, dim))
    else:
        monkeypatch.setattr(cached, name, wrong)
    assert not cache_agrees(HFModel(zoo.build("gemma3_text", window=8)))


def test_a_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests and completions begin with it, and whenever they come; another prompt is read too."""
    read: list[int] = []
    states = HFModel.cached_states

    def counted(self: HFModel, tokens: Any, *rest: Any) -> Any:
        read.append(tokens.numel())
        return states(self, tokens, *rest)

    model = model_of("cached")
    assert cache_agrees(model)
    monkeypatch.setattr(HFModel, "cached_states", counted)
    params = SamplingParams(max_tokens=1, stop=[])
    prompt = tuple(range(1, 13))
    three = [Asked(prompt, n, params, n, "", step, None) for n, step in ((5, 0), (1, 0), (2, 3))]
    decode(model, three, LaneLimits())
    assert read == [12]
    decode(model, [Asked(prompt, 1, params, 0, "", 0, None), Asked((1, 2), 1, params, 0, "", 0, None)], LaneLimits())
    assert read == [12, 24]  # two rows of twelve columns


def test_steps_are_those_of_the_longest() -> None:
    """Forty requests for one completion take as many steps as one of them, not forty times as many."""
    batch = ContinuousBatch(model_of("cached"))
    params = SamplingParams(max_tokens=10, stop=[])
    found = [batch.add(ModelInput.from_ints([1 + i % 7]), 1, params, i) for i in range(40)]
    while batch.busy:
        batch.advance()
    assert batch.steps == 10
    assert all(len(request.result()[0].tokens) == 10 for request in found)


def alive_of(request: GenerationRequest) -> int:
    return sum(row.alive and bool(row.tokens) for row in request.rows)


def test_an_owner_with_many_rows_makes_room() -> None:
    """Where a batch is full, another owner's request enters at the next step; the same owner's waits for its turn."""
    params = SamplingParams(max_tokens=20, stop=[])
    limits = LaneLimits(rows=8, share=2)
    for owner, begins_after in (("b", 1), ("a", 20)):
        batch = ContinuousBatch(model_of("cached"), limits)
        heavy = batch.add(ModelInput.from_ints([1, 2]), 8, params, 0, owner="a")
        batch.advance()
        light = batch.add(ModelInput.from_ints([3]), 4, params, 0, owner=owner)
        steps = 0
        while not light.rows:
            batch.advance()
            steps += 1
        assert steps == begins_after
        batch.advance()
        if owner == "b":
            assert (sum(len(row.tokens) > 0 for row in light.rows), batch.alive) == (2, 8)  # its share, one a step
            batch.advance()
            assert len(light.rows) == 2
        while batch.busy:
            batch.advance()
        assert all(len(row.tokens) == 20 for request in (heavy, light) for row in request.result())


def test_a_cancelled_request_leaves_at_once() -> None:
    """Its rows make room for those that wait, and the others go on as they were."""
    batch = ContinuousBatch(model_of("cached"), LaneLimits(rows=2))
    params = SamplingParams(max_tokens=6, stop=[])
    first, second = (batch.add(ModelInput.from_ints([1]), 1, params, seed) for seed in (0, 1))
    waiting = batch.add(ModelInput.from_ints([2]), 1, params, 2)
    batch.advance()
    assert not waiting.rows
    batch.cancel(first)
    assert batch.alive == 1
    batch.advance()
    assert len(waiting.rows) == 1
    while batch.busy:
        batch.advance()
    assert (first.done, len(second.result()[0].tokens), len(waiting.result()[0].tokens)) == (True, 6, 6)
    batch.cancel(second)
    assert second.result()


def failing(tokens: Sequence[int]) -> bool:
    raise LookupError("no such token")


def test_errors_concern_their_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop rule that fails, logits that are no numbers, and a prompt that the model cannot read end what they belong to."""
    model = model_of("cached")
    batch, params = ContinuousBatch(model), SamplingParams(max_tokens=6, stop=[])
    (sound,) = decode(model, [Asked((1, 2), 1, params, 5, "", 0, None)], LaneLimits())
    request = batch.add(ModelInput.from_ints([1, 2]), 1, params, 5)
    broken = batch.add(ModelInput.from_ints([1, 2]), 1, params, 6, ends=failing)
    batch.advance()
    with pytest.raises(LookupError, match="no such token"):
        broken.result()
    taken = lane._take
    monkeypatch.setattr(lane, "_take", lambda rows, logits, params: taken(rows, _spoilt(logits), params))
    diverged = batch.add(ModelInput.from_ints([3]), 1, params, 7)
    batch.advance()
    monkeypatch.undo()
    with pytest.raises(Exception, match="not finite"):
        diverged.result()
    monkeypatch.setattr(HFModel, "cached_states", _too_long(HFModel.cached_states))
    unread = batch.add(ModelInput.from_ints(range(1, 11)), 1, params, 8)
    while batch.busy:
        batch.advance()
    with pytest.raises(RuntimeError, match="ten tokens"):
        unread.result()
    assert request.result()[0].tokens == sound.result()[0].tokens


def _spoilt(logits: torch.Tensor) -> torch.Tensor:
    """The last row's are no numbers."""
    return torch.cat([logits[:-1], torch.full_like(logits[-1:], torch.nan)])


def _too_long(states: Any) -> Any:
    def limited(self: HFModel, tokens: Any, *rest: Any) -> Any:
        if tokens.shape[1] == 10:
            raise RuntimeError("ten tokens are too many")
        return states(self, tokens, *rest)

    return limited


@pytest.mark.parametrize(("max_tokens", "fits"), [(118, True), (119, True), (120, False)])
def test_texts_beyond_the_context_are_refused(max_tokens: int, fits: bool) -> None:
    """Before anything is decoded; the last token that is drawn is not read any more."""
    batch, prompt = ContinuousBatch(model_of("cached")), ModelInput.from_ints([1] * 10)
    params = SamplingParams(max_tokens=max_tokens, stop=[])
    if fits:
        batch.add(prompt, 1, params, 0)
        return
    with pytest.raises(InvalidDatumsError, match="context of 128 tokens"):
        batch.add(prompt, 1, params, 0)
    assert not batch.busy

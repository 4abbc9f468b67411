"""Requests on different adapters of one base are decoded together, and each gives what its adapter gives alone."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import VOCAB
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends import SamplingParams
from pullback.backends.native import HFModel
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.backends.native.decoding.lane import LaneLimits
from pullback.backends.native.decoding.requests import GenerationRequest
from pullback.backends.native.decoding.row_adapters import _Pieces
from pullback.datums import ModelInput
from pullback.errors import BackendError

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

from pretrained.adapters import adapted, rank

from pullback.testing import random_llama
from pullback.testing.models import zoo

KINDS: dict[str, Any] = {  # the layers of GPT-2 are Conv1D, and have a bias
    "gpt2": lambda: zoo.build("gpt2", vocab_size=VOCAB, eos_token_id=2, bos_token_id=1),
    "gpt_neox": lambda: zoo.build("gpt_neox", vocab_size=VOCAB, eos_token_id=2, bos_token_id=1),
    "llama": lambda: random_llama(vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, num_key_value_heads=1),
}
LAYERS = {
    "gpt2": ("c_attn", "c_fc"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "llama": ("q_proj", "down_proj"),
}
EXACT = ("gpt2", "gpt_neox")  # computes in fp64 all through, where the norms of Llama compute in fp32


@functools.cache
def models_of(kind: str, dtype: torch.dtype = torch.float64) -> list[HFModel]:
    """Return a base without an adapter, and with several: of other ranks and scales, and on other layers."""
    base, (attention, mlp) = KINDS[kind]().to(dtype), LAYERS[kind]
    chosen = (rank(3), rank(1, attention), rank(5, mlp, use_rslora=True))
    return [adapted(base, None), *(adapted(base, lora, seed) for seed, lora in enumerate(chosen))]


@dataclass(frozen=True)
class Asked:
    """A request on one of the models, and the step before which it comes."""

    model: int
    prompt: tuple[int, ...]
    n: int
    seed: int
    temperature: float
    max_tokens: int
    step: int
    owner: str

    def add(self, batch: ContinuousBatch, model: HFModel) -> GenerationRequest:
        params = SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, stop=[2])
        prompt = ModelInput.from_ints(list(self.prompt))
        return batch.add(prompt, self.n, params, self.seed, owner=self.owner, model=model)


TOKENS = st.integers(1, VOCAB - 1)
ASKED = st.builds(
    Asked,
    model=st.integers(0, 3),
    prompt=st.one_of(st.just((5, 6, 7)), st.lists(TOKENS, min_size=1, max_size=12).map(tuple)),
    n=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    max_tokens=st.integers(1, 8),
    step=st.integers(0, 6),
    owner=st.sampled_from(["a", "b"]),
)
LIMITS = st.builds(LaneLimits, rows=st.integers(1, 12), cells=st.integers(20, 300), share=st.integers(1, 3))


def together(models: Sequence[HFModel], asked: Sequence[Asked], limits: LaneLimits) -> list[GenerationRequest]:
    """Decode requests in the batch of the first model, each from its step on."""
    batch, step, found = ContinuousBatch(models[0], limits), 0, dict[int, GenerationRequest]()
    while len(found) < len(asked) or batch.busy:
        for i, one in enumerate(asked):
            if one.step == step:
                found[i] = one.add(batch, models[one.model])
        batch.advance()
        step += 1
    return [found[i] for i in range(len(asked))]


def alone(model: HFModel, one: Asked) -> GenerationRequest:
    """Decode a request by the adapted model itself, as peft runs it."""
    batch = ContinuousBatch(model)
    request = one.add(batch, model)
    while batch.busy:
        batch.advance()
    return request


def tokens(request: GenerationRequest) -> list[list[int]]:
    return [row.tokens for row in request.result()]


def scores(request: GenerationRequest) -> list[float]:
    return [x for row in request.result() for x in (*row.logprobs, *row.tempered)]


@given(kind=st.sampled_from(EXACT), asked=st.lists(ASKED, min_size=2, max_size=4), limits=LIMITS)
def test_each_adapter_gives_what_it_gives_alone(kind: str, asked: list[Asked], limits: LaneLimits) -> None:
    """In fp64 the same tokens and log-probs, whatever is decoded beside it, comes late, or has to wait."""
    models = models_of(kind)
    for one, request in zip(asked, together(models, asked, limits), strict=True):
        own = alone(models[one.model], one)
        assert tokens(request) == tokens(own)
        assert scores(request) == pytest.approx(scores(own), abs=1e-12, rel=0)


@pytest.mark.slow
@given(asked=st.lists(ASKED, min_size=2, max_size=2))
def test_in_fp32_log_probs_are_close(asked: list[Asked]) -> None:
    """Within 1e-5 nats up to the first token that differs, if one does."""
    models = models_of("llama", torch.float32)
    for one, request in zip(asked, together(models, asked, LaneLimits()), strict=True):
        for row, own in zip(request.result(), alone(models[one.model], one).result(), strict=True):
            pairs = list(zip(row.tokens, own.tokens, row.logprobs, own.logprobs, strict=False))
            same = next((i for i, (a, b, _, _) in enumerate(pairs) if a != b), len(pairs))
            assert all(abs(a - b) <= 1e-5 for _, _, a, b in pairs[:same])


@pytest.mark.slow
def test_adapters_change_what_is_drawn() -> None:
    """What would be the same without adapters differs between all of them, and from the base."""
    models = models_of("llama")
    asked = [Asked(i, (5, 6, 7), 1, 0, 0.0, 8, 0, "") for i in range(len(models))]
    assert len({tuple(scores(request)) for request in together(models, asked, LaneLimits())}) == len(models)


@pytest.mark.slow
def test_the_log_probs_are_those_of_whole_forwards() -> None:
    """Of the peft model, without a cache, a batch, or anything of ours."""
    models = models_of("gpt2")
    asked = [Asked(i, (5, 6, 7, i + 1), 2, i, 1.0, 8, i, "") for i in range(len(models))]
    for one, request in zip(asked, together(models, asked, LaneLimits()), strict=True):
        for row in request.result():
            text: Any = row.text.tokens
            with torch.no_grad():
                logits = models[one.model].model(input_ids=text[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            own = logits.gather(-1, text[1:, None])[-len(row.tokens) :, 0].tolist()
            assert row.logprobs == pytest.approx(own, abs=1e-12, rel=0)


class Forwards:
    """Counts the forwards of all models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, states = 0, HFModel.cached_states

        def counted(model: HFModel, *given: Any) -> Any:
            self.count += 1
            return states(model, *given)

        monkeypatch.setattr(HFModel, "cached_states", counted)


@pytest.mark.slow
def test_eight_adapters_take_the_forwards_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the prompts and one for each further token; eight batches would take eight times as many."""
    base = KINDS["llama"]()
    models = [adapted(base, None), *(adapted(base, 2, seed) for seed in range(8))]
    batch = ContinuousBatch(models[0])
    assert all(batch.accepts(model) for model in models)
    forwards, found = Forwards(monkeypatch), []
    for i in range(8):
        found.append(Asked(i + 1, (3, 4, 5 + i), 1, i, 1.0, 20, 0, str(i)).add(batch, models[i + 1]))
    while batch.busy:
        batch.advance()
    assert forwards.count == batch.steps == max(len(request.result()[0].tokens) for request in found)


@pytest.mark.slow
def test_an_owner_on_another_adapter_gets_its_share() -> None:
    """Where a batch is full of one adapter's rows, another owner's enters at the next step, whichever adapter it is on."""
    models = models_of("llama")
    batch = ContinuousBatch(models[0], LaneLimits(rows=8, share=2))
    heavy = Asked(1, (1, 2), 8, 0, 1.0, 20, 0, "a").add(batch, models[1])
    batch.advance()
    assert batch.alive > 2
    light = Asked(2, (3,), 4, 0, 1.0, 20, 0, "b").add(batch, models[2])
    batch.advance()
    batch.advance()
    assert sum(bool(row.tokens) for row in light.rows) >= 2
    while batch.busy:
        batch.advance()
    assert (len(heavy.result()), len(light.result())) == (8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_adapter_ends_its_own_requests(broken: float) -> None:
    """Numbers that are not finite stay in the rows of their adapter."""
    base = KINDS["llama"]().double()
    models = [adapted(base, None), adapted(base, 2, 0), adapted(base, 2, 1)]
    asked = [Asked(i, (5, 6), 2, i, 1.0, 6, 0, "") for i in (1, 0, 2, 1)]
    sound = [tokens(request) for request in together(models, asked, LaneLimits())]
    for name, p in models[2].named_parameters():
        if "lora_A" in name:
            p.data[0] = broken
    found = together(models, asked, LaneLimits())
    with pytest.raises(BackendError, match="not finite"):
        found[2].result()
    assert [tokens(found[i]) for i in (0, 1, 3)] == [sound[i] for i in (0, 1, 3)]


@pytest.mark.parametrize("broken", [float("nan"), 1e30])
def test_a_diverged_adapter_that_comes_first_decides_nothing_for_others(broken: float) -> None:
    """Whether adapters on these layers can be decoded together is tried with weights that are nobody's."""
    base = KINDS["gpt2"]()
    models = [adapted(base, None), *(adapted(base, rank(2, "c_attn"), seed) for seed in range(2))]
    trained = [p for p in models[1].parameters() if p.requires_grad]
    for p in trained:
        p.data[:] = broken
    batch = ContinuousBatch(models[0])
    assert [batch.accepts(model) for model in models] == [True] * 3
    assert all(torch.equal(p, torch.full_like(p, broken)) or bool(p.isnan().all()) for p in trained)


@pytest.mark.slow
def test_an_adapter_goes_with_its_last_row() -> None:
    """A batch holds neither weights nor texts of a model that nobody samples from any more."""
    base = KINDS["llama"]()
    batch, model = ContinuousBatch(adapted(base, None)), adapted(base, 2)
    request = Asked(0, (5, 6), 2, 0, 1.0, 3, 0, "").add(batch, model)
    while batch.busy:
        batch.advance()
    trained = [p for p in model.parameters() if p.requires_grad]
    held: list[weakref.ref[Any]] = [weakref.ref(one) for one in (model, *trained)]
    del trained
    del model, request
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    assert not batch._cached._decoder._adapters._layers  # type: ignore[union-attr]


def test_an_adapter_that_goes_leaves_the_others_as_they_are() -> None:
    """Nobody may have it any more while rows of several others, which came before it, go on."""
    base = KINDS["gpt2"]().double()
    models = [adapted(base, None), *(adapted(base, rank(2, "c_attn"), seed) for seed in range(3))]
    asked = [Asked(i, (5, 6), 1, i, 1.0, most, 0, "") for i, most in ((1, 6), (2, 6), (3, 1))]
    batch, gone = ContinuousBatch(models[0]), weakref.ref(models[3])
    kept = [one.add(batch, models[one.model]) for one in asked][:2]
    batch.advance()
    models.pop()
    gc.collect()
    assert gone() is None
    while batch.busy:
        batch.advance()
    assert [tokens(request) for request in kept] == [tokens(alone(models[one.model], one)) for one in asked[:2]]


@given(adapters=st.lists(st.integers(0, 4), min_size=1, max_size=30), length=st.integers(1, 3), seed=st.integers(0, 99))
def test_pieces_give_each_row_its_own_product(adapters: list[int], length: int, seed: int) -> None:
    """As row by row; and what is computed is less than twice the rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, a, b = draw(len(adapters), length, 4), draw(5, 2, 4), draw(5, 3, 2)
    pieces = _Pieces(adapters, 5, x.device)
    expected = torch.stack([row @ a[i].T @ b[i].T for row, i in zip(x, adapters, strict=True)])
    assert pieces.product(x, a, b) == pytest.approx(expected, abs=1e-12)
    assert pieces._rows.numel() < 2 * len(adapters)

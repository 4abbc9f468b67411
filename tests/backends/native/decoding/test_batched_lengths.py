"""Texts that pass a length beyond which a model computes otherwise are decoded beside others, and each as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="caches are transformers' own (extra hf)")

from pretrained.ropes import CONTEXT, ROPES

from pullback.backends import SamplingParams
from pullback.backends.native import HFModel
from pullback.backends.native.decoding import batch as batching
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.backends.native.decoding.cached import CachedDecoder
from pullback.backends.native.decoding.requests import GenerationRequest
from pullback.datums import ModelInput
from pullback.testing.models import zoo

LENGTHS = ((10, 6), (10, 7), (14, 2), (3, 5), (20, 9), (15, 8))  # prompt, max_tokens: 16 tokens at most, or more


def model_of(name: str) -> HFModel:
    return HFModel(zoo.build(name, **ROPES[name]).double())


def requests(batch: ContinuousBatch, which: range) -> list[GenerationRequest]:
    found = []
    for i in which:
        length, most = LENGTHS[i]
        tokens = torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(i))
        found.append(batch.add(ModelInput.from_ints(tokens), 2, SamplingParams(max_tokens=most, stop=[]), i))
    return found


def drawn(batch: ContinuousBatch, asked: list[GenerationRequest]) -> list[list[float]]:
    while batch.busy:
        batch.advance()
    return [[*row.tokens, *row.logprobs] for request in asked for row in request.result()]


def own_logprobs(plain: Any, request: GenerationRequest) -> list[float]:
    """Log-probs of the completions by whole forwards of the model itself."""
    found = []
    for row in request.result():
        text = row.text.tokens
        with torch.no_grad():
            logits = plain(input_ids=text[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        found += logits.gather(-1, text[1:, None])[-len(row.tokens) :, 0].tolist()
    return found


@pytest.mark.parametrize("name", ROPES)
def test_each_text_has_its_own_frequencies(name: str) -> None:
    """Short and long ones side by side: the tokens of each alone, and at its end the model's own log-probs."""
    together = ContinuousBatch(model_of(name))
    asked = requests(together, range(len(LENGTHS)))
    found = drawn(together, asked)
    alone: list[list[float]] = []
    for i in range(len(LENGTHS)):
        one = ContinuousBatch(model_of(name))
        alone += drawn(one, requests(one, range(i, i + 1)))
    for ours, theirs in zip(found, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for request in asked:
        if request.prompt.numel() > CONTEXT or request.prompt.numel() + request.params.max_tokens <= CONTEXT:
            scores = [x for row in request.result() for x in row.logprobs]
            plain = zoo.build(name, **ROPES[name]).double().eval()
            if name == "phi3" or request.prompt.numel() <= CONTEXT:  # dynamic frequencies change with every token
                assert own_logprobs(plain, request) == pytest.approx(scores, abs=1e-5)


def test_a_cache_that_is_kept_beyond_the_length_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a cache, a text that grows beyond the length keeps the keys of a short one."""
    model = model_of("phi3")
    crossing = range(5, 6)
    one = ContinuousBatch(model)
    found = drawn(one, requests(one, crossing))
    monkeypatch.setattr(batching, "PlainDecoder", lambda: CachedDecoder(model))
    other = ContinuousBatch(model)
    wrong = drawn(other, requests(other, crossing))
    assert max(abs(a - b) for x, y in zip(found, wrong, strict=True) for a, b in zip(x, y, strict=True)) > 1e-3

"""How large the answer to a request for samples can become is known before a token is sampled."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import VOCAB, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from servers import Direct
from torch import Tensor

from pullback.backends.native.decoding import next_tokens
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.backends.native.decoding.next_tokens import top_k_tokens
from pullback.datums import ModelInput
from pullback.errors import ConfigError
from pullback.ops import head_logits
from pullback.service.durability.answers import Failure
from pullback.service.sampling import sample_requests
from pullback.service.sampling.sample_requests import RequestedScores

PROMPT = [1, 2, 3, 4]


def asked(direct: Direct, number: int, n: int, most: int, **scores: Any) -> Any:
    """The answer to a request for n completions."""
    body = {"sampling_session_id": "sess:sample:0", "seq_id": number, "num_samples": n, **scores}
    body |= {"prompt": {"chunks": [{"tokens": PROMPT}]}, "sampling_params": {"max_tokens": most, "seed": 1, "stop": []}}
    return direct.read(direct.operations.samplers.sample("me", json.dumps(body).encode(), body)["request_id"])


def test_too_large_an_answer_is_refused_before_it_is_decoded(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of each limit; what is refused has made no step of the decoder."""
    steps: list[int] = []
    advance = ContinuousBatch.advance

    def counted(self: ContinuousBatch) -> None:
        steps.append(1)
        advance(self)

    monkeypatch.setattr(ContinuousBatch, "advance", counted)
    monkeypatch.setattr(sample_requests, "_MOST", 2 * 5 * 3 + 4 * 2)
    direct.operations.samplers.create("sess:sample:0", "me", {"base_model": "tiny"})
    taken, refused = {"topk_sample_logprobs": 3, "topk_prompt_logprobs": 2}, []
    assert isinstance(asked(direct, 0, 2, 5, **taken), bytes)
    assert steps
    steps.clear()
    for number, (n, most, more) in enumerate(((3, 5, {}), (2, 6, {}), (2, 5, {"topk_prompt_logprobs": 3})), 1):
        refused.append(asked(direct, number, n, most, **{**taken, **more}))
    refused.append(asked(direct, 9, 1, 1, topk_sample_logprobs=VOCAB + 1))
    assert all(isinstance(answer, Failure) and answer.category == "user" for answer in refused)
    assert "up to 53 numbers were asked for at once" in refused[0].text
    assert "completions of up to 15 together; this server answers 38: ask for fewer" in refused[0].text
    assert f"the top-{VOCAB + 1} tokens were asked for; the vocabulary has {VOCAB}" == refused[3].text
    assert not steps


def test_tokens_beside_completions_take_no_more_than_is_answered(
    direct: Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt beside which nothing was asked for, however long, no row over the vocabulary is made."""
    rows = list[int]()

    def counted(hidden: Tensor, head: Any) -> Tensor:
        rows.append(len(hidden))
        return head_logits(hidden, head)

    monkeypatch.setattr(next_tokens, "head_logits", counted)
    direct.operations.samplers.create("sess:sample:0", "me", {"base_model": "tiny"})
    for number, prompt_top in enumerate((0, 2)):
        scores = {"topk_sample_logprobs": VOCAB, "topk_prompt_logprobs": prompt_top}
        assert isinstance(asked(direct, number, 2, 3, **scores), bytes)
    assert rows == [3, 3, 3, 3, len(PROMPT) - 1]


@given(tokens=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9), first=st.integers(0, 9), k=st.integers(1, 3))
def test_the_last_rows_are_those_of_all(tokens: list[int], first: int, k: int) -> None:
    """Looking from a token on gives what looking from the first one gives there."""
    model, text = tiny_llama(torch.float64), torch.tensor(tokens)
    every, found = top_k_tokens(model, text, k), top_k_tokens(model, text, k, first)
    assert torch.equal(found[0], every[0][first:])
    assert torch.allclose(found[1], every[1][first:], atol=1e-6, rtol=0)
    assert found[0].shape == (max(0, len(tokens) - 1 - first), k)


@given(
    prompt=st.integers(1, 50),
    completions=st.integers(0, 500),
    prompt_top=st.integers(0, 9),
    completion_top=st.integers(0, 9),
    drawn=st.integers(0, 9),
    most=st.integers(0, 5000),
)
def test_the_bound_is_the_most_that_can_be_answered(
    prompt: int, completions: int, prompt_top: int, completion_top: int, drawn: int, most: int
) -> None:
    """A row of numbers for each token of the prompt, and of all completions; refused only beyond the limit."""
    body = {
        "topk_prompt_logprobs": prompt_top,
        "topk_sample_logprobs": completion_top,
        "prompt_alt_tokens_k": drawn,
    }
    requested = RequestedScores.of(body, ModelInput.from_ints([1] * prompt), 1.0)
    larger = prompt * max(prompt_top, drawn) + completions * completion_top > most
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_requests, "_MOST", most)
        try:
            requested.check(VOCAB, prompt, completions)
        except ConfigError:
            assert larger
        else:
            assert not larger

"""What a sampling client may ask for beside tokens, and where its completions end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
import torch
from pretrained.folders import chat_folder
from servers import KEY, SDK_WARNINGS, finished

from pullback.backends import TorchBackend
from pullback.backends.native.models.lora import LoraChoice
from pullback.cli.serve import load_base
from pullback.datums import Datum, ModelInput
from pullback.service import ServedModels, serving

pytestmark = SDK_WARNINGS
PROMPT = [40, 41, 42, 43, 44, 45]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models on a folder with a tokenizer, loaded as the command does."""
    from argparse import Namespace

    folder = chat_folder(tmp_path_factory.mktemp("models") / "chat")
    given = Namespace(model=str(folder), name="chat", device="cpu", dtype="float32", token_budget=512)
    return ServedModels(load_base(given), tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def chat_url(chat: Any) -> Iterator[str]:
    with serving(chat, keys=[KEY]) as address:
        yield address


@pytest.fixture
def sampler(chat_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=chat_url, api_key=KEY) as client:
        yield client.create_sampling_client(base_model="chat").result()
    gc.collect()  # the SDK's sockets, while their warnings are expected


@pytest.fixture
def whole(chat: Any) -> torch.Tensor:
    """All log-probs after each token of the prompt but the last, by a native forward on every token, [T - 1, V]."""
    backend = TorchBackend(chat.base.adapted(LoraChoice(rank=1)))
    vocab, length = backend.vocab_size, len(PROMPT) - 1
    data = [Datum(ModelInput.from_ints(PROMPT[:-1]), {"target_tokens": [v] * length}) for v in range(vocab)]
    outputs = backend.forward(data).result().loss_fn_outputs
    return torch.stack([one["logprobs"].to_torch() for one in outputs], 1)


def ask(sampler: Any, params: dict[str, Any] | None = None, n: int = 2, **asked: Any) -> Any:
    given = tinker.SamplingParams(**{"max_tokens": 4, "stop": [], "seed": 1, **(params or {})})
    return sampler.sample(tinker.ModelInput.from_ints(PROMPT), n, given, **asked).result()


def test_alternatives_are_the_models(sampler: Any, whole: torch.Tensor) -> None:
    """Top-k, given and sampled tokens at every position of the prompt carry the log-probs of forward."""
    named = torch.tensor([[1, -1], [2, 258], [-1, -1], [0, 7], [3, 3]])
    found = ask(
        sampler,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        target_prompt_logprobs=tinker.TensorData.from_torch(named),
        prompt_alt_tokens_k=5,
    )
    scores, order = whole.topk(3, -1)
    assert found.topk_prompt_logprobs[0] is None
    for row, ids, values in zip(found.topk_prompt_logprobs[1:], order.tolist(), scores.tolist(), strict=True):
        assert [token for token, _ in row] == ids
        assert [value for _, value in row] == pytest.approx(values, abs=1e-5)
    own = whole.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    assert found.prompt_logprobs[1:] == pytest.approx(own, abs=1e-5)
    wanted = torch.where(named < 0, torch.zeros(()), whole.gather(-1, named.clamp(min=0)))
    torch.testing.assert_close(found.target_prompt_logprobs.to_torch(), wanted, atol=1e-5, rtol=0)
    drawn, values = found.prompt_alt_tokens.tokens.to_torch(), found.prompt_alt_tokens.logprobs.to_torch()
    torch.testing.assert_close(values, whole.gather(-1, drawn), atol=1e-5, rtol=0)
    greedy = ask(sampler, {"temperature": 0.0}, prompt_alt_tokens_k=2).prompt_alt_tokens.tokens.to_torch()
    assert torch.equal(greedy, order[:, :1].expand(-1, 2))


def test_only_the_end_of_the_prompt_is_scored(sampler: Any) -> None:
    """prompt_logprobs_last_n leaves out what comes before, by token and by rank."""
    found = ask(sampler, include_prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=2)
    assert [x is None for x in found.prompt_logprobs] == [True] * 4 + [False] * 2
    assert [x is None for x in found.topk_prompt_logprobs] == [True] * 4 + [False] * 2


def test_alternatives_of_a_completion(sampler: Any) -> None:
    """At each sampled token the top-k are answered; a greedy completion is made of them."""
    found = ask(sampler, {"temperature": 0.0}, topk_sample_logprobs=2)
    for sequence in found.sequences:
        assert len(sequence.topk_logprobs) == 4
        for (first, second), token, logprob in zip(
            sequence.topk_logprobs, sequence.tokens, sequence.logprobs, strict=True
        ):
            assert first == (token, pytest.approx(logprob, abs=1e-4))
            assert second[1] <= first[1]


def test_strings_end_a_completion(sampler: Any, chat: Any) -> None:
    """A completion stops with the token that completes a string, however it is cut into tokens, and not before."""
    tokenizer = chat.base.tokenizer()
    ended = 0
    for seed in range(6):
        (free,) = ask(sampler, {"max_tokens": 60, "seed": seed}, n=1).sequences
        text = tokenizer.decode(free.tokens)
        pairs = [text[i : i + 2] for i in range(20, len(text) - 1) if text[i : i + 2].isprintable()]
        stop = next(pair for pair in pairs if pair.isascii())
        for given in (stop, ["never to be found", stop]):
            (cut,) = ask(sampler, {"max_tokens": 60, "seed": seed, "stop": given}, n=1).sequences
            ended += stop in tokenizer.decode(cut.tokens)
            assert cut.stop_reason == "stop"
            assert cut.tokens == free.tokens[: len(cut.tokens)]
            assert stop not in tokenizer.decode(cut.tokens[:-1])
    assert ended >= 8  # the rest met the model's own end of text before


def test_without_a_limit_a_completion_ends_with_the_context(chat_url: str, web: Any) -> None:
    """max_tokens absent: end of text, or the model's context; a JSON client reads everything too."""
    http = web(chat_url)
    session = http.post("create_session", json={}).json()["session_id"]
    http.post(
        "create_sampling_session", json={"session_id": session, "sampling_session_seq_id": 0, "base_model": "chat"}
    )
    body = {
        "sampling_session_id": f"{session}:sample:0",
        "prompt": {"chunks": [{"tokens": [40] * 1000, "type": "encoded_text"}]},
        "sampling_params": {"stop": []},
    }
    found = finished(http, http.post("asample", json={**body, "seq_id": 0}).json()["request_id"])
    assert len(found["sequences"][0]["tokens"]) == 24
    body["sampling_params"] = {"stop": [], "max_tokens": 1}
    body["prompt"]["chunks"][0]["tokens"] = PROMPT  # type: ignore[index]
    asked = {"topk_prompt_logprobs": 2, "topk_sample_logprobs": 2, "prompt_alt_tokens_k": 1}
    target = {"data": [3] * 5, "dtype": "int64", "shape": [5, 1]}
    found = finished(
        http,
        http.post("asample", json={**body, **asked, "target_prompt_logprobs": target, "seq_id": 1}).json()[
            "request_id"
        ],
    )
    assert found["topk_prompt_logprobs"][0] is None
    assert [len(row) for row in found["topk_prompt_logprobs"][1:]] == [2] * 5
    assert len(found["sequences"][0]["topk_logprobs"][0]) == 2
    assert found["target_prompt_logprobs"]["shape"] == found["prompt_alt_tokens"]["tokens"]["shape"] == [5, 1]


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"topk_prompt_logprobs": 10**6}, "vocabulary has 259"),
    ({}, {"topk_sample_logprobs": -1}, "topk_sample_logprobs must be a whole number"),
    ({}, {"prompt_logprobs": True, "prompt_logprobs_last_n": 6}, "5 tokens to score"),
    ({}, {"target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 1]}}, r"\[5, K\]"),
    ({}, {"target_prompt_logprobs": {"data": [999] * 5, "dtype": "int64", "shape": [5, 1]}}, "names token 999"),
    ({}, {"prompt_alt_tokens_k": 10**7}, "numbers were asked for"),
    ({"stop": [1, "a"]}, {}, "stop must be"),
    ({"stop": [""]}, {}, "stop must be"),
    ({"beams": 2}, {}, "beams"),
]


def test_what_cannot_be_answered_is_refused(chat_url: str, web: Any) -> None:
    """Each fails its own request in words."""
    http = web(chat_url)
    session = http.post("create_session", json={}).json()["session_id"]
    http.post(
        "create_sampling_session", json={"session_id": session, "sampling_session_seq_id": 0, "base_model": "chat"}
    )
    prompt = {"chunks": [{"tokens": PROMPT, "type": "encoded_text"}]}
    for i, (params, asked, words) in enumerate(BAD):
        body = {
            "sampling_session_id": f"{session}:sample:0",
            "seq_id": i,
            "prompt": prompt,
            "sampling_params": {"max_tokens": 1, **params},
        }
        found = finished(http, http.post("asample", json={**body, **asked}).json()["request_id"])
        with pytest.raises(RuntimeError, match=words):
            raise RuntimeError(found["error"])


def test_strings_need_a_tokenizer(service: Any) -> None:
    """A server that has none says so."""
    sampler = service.create_sampling_client(base_model="tiny").result()
    with pytest.raises(
        tinker.RequestFailedError, match=r"strings to stop at need a tokenizer, .* give stop as token ids"
    ):
        sampler.sample(tinker.ModelInput.from_ints([1]), 1, tinker.SamplingParams(stop="a")).result()
    del sampler
    gc.collect()

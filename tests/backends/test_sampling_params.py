"""What may be said of sampling means the same in whatever form it is given, and all else is refused when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.backends import FakeBackend, Rollout, SamplingParams, TorchBackend
from pullback.datums import ModelInput
from pullback.errors import ConfigError, DatumError
from pullback.testing import TinyLM

PROMPTS = [ModelInput.from_ints([1, 2]), ModelInput.from_ints([3])]
FORMS: list[Callable[[list[int]], Any]] = [
    list,
    tuple,
    set,
    lambda ids: torch.tensor(ids, dtype=torch.int32),
    lambda ids: np.array(ids, dtype=np.int64),
    lambda ids: [np.int64(i) for i in ids],
    lambda ids: [torch.tensor(i) for i in ids],
]
BACKENDS: list[Callable[[], Any]] = [FakeBackend, lambda: TorchBackend(TinyLM())]


def drawn(backend: Any, **params: Any) -> list[Rollout]:
    rollouts: list[Rollout] = backend.sample(PROMPTS, 2, SamplingParams(max_tokens=8, seed=3, **params)).result()
    return rollouts


def ended(tokens: list[int], stop: list[int]) -> list[int]:
    """The definition: up to the first token to stop at, and that one too."""
    last = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: last + 1]


@pytest.mark.parametrize("make", BACKENDS)
@settings(max_examples=10)
@given(stop=st.lists(st.integers(0, 16), max_size=4, unique=True), form=st.sampled_from(FORMS))
def test_tokens_to_stop_at(make: Callable[[], Any], stop: list[int], form: Callable[[list[int]], Any]) -> None:
    """In any form they end a completion where it first has one of them, and change nothing before."""
    backend = make()
    for whole, cut in zip(drawn(backend, stop=[]), drawn(backend, stop=form(stop)), strict=True):
        assert cut.tokens == ended(whole.tokens, stop)
        assert cut.stop_reason == ("stop" if set(cut.tokens) & set(stop) else "length")
        assert cut.logprobs == pytest.approx(whole.logprobs[: len(cut.tokens)], abs=1e-6)


REFUSED = [
    ({"stop": "a"}, "stop must be token ids, got 'a'.*encode it"),
    ({"stop": ["ab", "c"]}, "stop must be token ids"),
    ({"stop": b"a"}, "stop must be token ids"),
    ({"stop": 3}, "stop must be a list of token ids"),
    ({"stop": [[1, 2]]}, "stop must be a list of token ids"),
    ({"stop": [[1], [2, 3]]}, "stop must be a list of token ids"),
    ({"stop": [1.0]}, "whole numbers of at least 0"),
    ({"stop": [True]}, "whole numbers of at least 0"),
    ({"stop": torch.tensor(3)}, "stop must be a list of token ids"),
    ({"stop": [-1]}, "whole numbers of at least 0"),
    ({"stop": [17]}, r"stop has \[17\], outside the vocabulary of 17"),
    *(
        ({name: value}, f"{name} must be a whole number")
        for name in ("max_tokens", "top_k", "seed")
        for value in (2.5, "2", True)
    ),
    *(({name: value}, f"{name} must be a number") for name in ("temperature", "top_p") for value in ("0.5", True, [1])),
]


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize(("params", "words"), REFUSED)
def test_what_is_no_such_thing(make: Callable[[], Any], params: dict[str, Any], words: str) -> None:
    """It is neither rounded, nor compared with tokens that it can never equal."""
    with pytest.raises(ConfigError, match=words):
        make().sample(PROMPTS, 1, SamplingParams(**params)).result()


@pytest.mark.parametrize("n", [2.5, "2", True, None])
def test_numbers_of_completions(n: Any) -> None:
    with pytest.raises(DatumError, match="n must be a whole number of completions"):
        FakeBackend().sample(PROMPTS, n, SamplingParams()).result()


def test_one_prompt_and_plain_mappings() -> None:
    """What lies close to a call gets an answer that says how to make it one."""
    with pytest.raises(DatumError, match=r"for one: \[prompt\]"):
        FakeBackend().sample(PROMPTS[0], 1, SamplingParams()).result()  # type: ignore[arg-type]  # the point
    with pytest.raises(ConfigError, match="sample needs SamplingParams, got dict"):
        FakeBackend().sample(PROMPTS, 1, {"max_tokens": 3}).result()  # type: ignore[arg-type]  # the point
    of_numpy: dict[str, Any] = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.int64(1)}
    assert SamplingParams(**of_numpy).max_tokens == 3

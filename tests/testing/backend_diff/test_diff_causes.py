"""The pattern of a divergence names its cause, wherever it is planted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_data
from hypothesis import given
from hypothesis import strategies as st
from planted import Change, Scores, detached, scaled, scoring, signalling, stepping
from torch import Tensor

from pullback.backends import FakeBackend, PreparedCall, TorchBackend
from pullback.datums import Datum
from pullback.losses import CrossEntropy
from pullback.testing import BackendDiff, PackingLeakLM, TinyLM, diff
from pullback.testing.backend_diff.numbers import counts_of, named_factor
from pullback.testing.modelcheck.layouts import using_layout

DATA = make_data([9, 6, 12, 8])
WEIGHTED = [d.with_inputs(weights=0.5 * d.loss_fn_inputs["weights"].to_torch()) for d in DATA]


def found(backend: Any, data: list[Datum] | None = None, loss: Any = "cross_entropy", other: Any = None) -> BackendDiff:
    return diff(other or FakeBackend(), backend, loss, data or DATA)


def each(change: Callable[[Tensor], Tensor]) -> Scores:
    return lambda scores, call: [change(x) for x in scores]


def from_token(token: int) -> Scores:
    def change(scores: list[Tensor], call: PreparedCall) -> list[Tensor]:
        seen = [(r.tokens == token).cumsum(0) > 0 for r in call.requests]
        return [x - 0.1 * s for x, s in zip(scores, seen, strict=True)]

    return change


def leaking(scores: list[Tensor], call: PreparedCall) -> list[Tensor]:
    before = [scores[i - 1].mean() if i else 0.0 for i in range(len(scores))]
    return [x + 0.1 * m for x, m in zip(scores, before, strict=True)]


def token_in_two_texts(data: list[Datum]) -> int:
    """A token that two texts have at first places that lie apart."""
    for token in range(17):
        places = [d.model_input.to_ints().index(token) for d in data if token in d.model_input.to_ints()]
        if len(places) > 1 and max(places) - min(places) > 1 and min(places) > 0:
            return token
    raise AssertionError("the data has no such token")


LOGPROBS: dict[str, tuple[Scores, str]] = {
    "a window": (
        each(lambda x: x - 0.2 * (torch.arange(len(x)) >= 7)),
        "agrees up to position 6 and differs from position 7",
    ),
    "a shift": (each(lambda x: torch.cat([x[:1], x[:-1]])), "b's numbers are a's of one token earlier: a shift"),
    "a shift back": (each(lambda x: torch.cat([x[1:], x[-1:]])), "a's numbers are b's of one token earlier: a shift"),
    "the first token": (each(lambda x: x - 0.2 * (torch.arange(len(x)) == 0)), "only the first token of every text"),
    "the last token": (
        each(lambda x: x - 0.2 * (torch.arange(len(x)) == len(x) - 1)),
        "only the last token of every text",
    ),
    "an embedding row": (
        from_token(token_in_two_texts(DATA)),
        f"up to token {token_in_two_texts(DATA)} and differs from it",
    ),
    "a leak": (leaking, "b gives datum . other log-probs in a call of its own"),
    "a padded vocabulary": (each(lambda x: x - 0.3), "b gives every token a smaller log-prob than a"),
    "other weights": (
        each(lambda x: x + 0.3 * torch.sin(50 * x).clamp(max=0) + 0.01 * torch.cos(9 * x)),
        "almost every token",
    ),
}


@pytest.mark.parametrize("what", LOGPROBS)
def test_causes_of_logprobs(what: str) -> None:
    """Each planted change of log-probs is named."""
    change, words = LOGPROBS[what]
    result = found(scoring(lambda scores, call: [x.clamp(max=0) for x in change(scores, call)]))
    assert result.first is not None
    assert result.first.stage == "logprobs"
    assert re.search(words, result.cause), result.cause


def test_the_order_of_datums() -> None:
    """Log-probs that belong to another datum are known as that."""
    data = make_data([6, 6, 6, 6])
    result = found(
        scoring(lambda scores, call: scores if len(scores) == 1 else [scores[i] for i in (1, 0, 3, 2)]), data
    )
    assert "another order: b's are a's [1, 0, 3, 2]" in result.cause


def test_a_model_whose_sequences_see_each_other() -> None:
    """A model that leaks where it is packed, against itself one text at a time."""
    leaky = TorchBackend(PackingLeakLM(TinyLM()), layout="single")
    apart = found(leaky, other=TorchBackend(TinyLM()))
    assert not apart.diverges
    with using_layout(leaky, "packed"):
        assert "b gives datum" in found(leaky, other=TorchBackend(TinyLM())).cause


@given(n=st.integers(2, 7))
def test_any_window(n: int) -> None:
    """The position from which on texts differ is found, whatever it is."""
    change = each(lambda x: x - 0.2 * (torch.arange(len(x)) >= n))
    assert f"differs from position {n} on" in found(scoring(change)).cause


def first_trained(c: Tensor, call: PreparedCall, i: int) -> Tensor:
    return c * (torch.arange(len(c)) != int((c != 0).nonzero()[0, 0]))


def last_trained(c: Tensor, call: PreparedCall, i: int) -> Tensor:
    return c * (torch.arange(len(c)) != int((c != 0).nonzero()[-1, 0]))


def by_length(c: Tensor, call: PreparedCall, i: int) -> Tensor:
    return c / int((c != 0).sum())


def clipped(c: Tensor, call: PreparedCall, i: int) -> Tensor:
    return c * (torch.arange(len(c)) % 3 != 1)


COTANGENTS: dict[str, tuple[Change, str]] = {
    "a mean over tokens": (
        lambda c, call, i: c / 31,
        r"b divides by the number of trained tokens \(31\), and a does not",
    ),
    "a sum": (lambda c, call, i: c * 4, r"a divides by the number of sequences \(4\), and b does not"),
    "the sign": (lambda c, call, i: -c, "b is -1 times a: the sign"),
    "each sequence": (by_length, "b divides each sequence by its own length"),
    "a weight of sequences": (lambda c, call, i: c * (i + 1), r"a factor of each sequence \(1, 2, 3, 4\)"),
    "the first trained token": (first_trained, "b has no gradient at the first trained token of every text"),
    "the last trained token": (last_trained, "b has no gradient at the last trained token of every text"),
    "clipping": (clipped, "b has no gradient at these tokens: clipped"),
    "the mask": (lambda c, call, i: torch.where(c == 0, -1.0, c), "only b trains tokens of weight 0"),
    "another loss": (lambda c, call, i: c - 0.3 * torch.rand(c.shape), "the definitions differ"),
}


@pytest.mark.parametrize("what", COTANGENTS)
def test_causes_of_cotangents(what: str) -> None:
    """Each planted change of cotangents is named."""
    change, words = COTANGENTS[what]
    result = found(signalling(change))
    assert result.first is not None
    assert result.first.stage == "cotangent"
    assert re.search(words, result.cause), result.cause


def test_cotangents_that_are_moved() -> None:
    """Cotangents of the token before are known as that."""
    moved = signalling(lambda c, call, i: torch.cat([c[:1], c[:-1]]))
    assert "b's numbers are a's of one token earlier" in found(moved, loss="importance_sampling").cause


def test_weights_that_count_twice() -> None:
    """Cotangents with the weights in them once more are known as that."""
    data = [d.with_inputs(weights=torch.linspace(0.1, 1.0, len(d.model_input))) for d in DATA]
    twice = signalling(lambda c, call, i: c * data[i].loss_fn_inputs["weights"].to_torch())
    assert "b has the weights in it once more" in found(twice, data).cause


def test_two_aggregations() -> None:
    """One log-prob, two normalisations: the mean over tokens and the sum differ by their count."""
    fake = FakeBackend()
    real = fake.forward_backward
    setattr(fake, "forward_backward", lambda data, loss, config: real(data, CrossEntropy("token_mean")))  # noqa: B010
    result = found(fake, loss=CrossEntropy("sum"))
    assert result.first is not None
    assert "b divides by the number of trained tokens (31)" in result.cause


GRADIENTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "one layer": (
        lambda: scaled(lambda n: n == "blocks.0.up", 2.0),
        "blocks.0.up",
        "blocks.0.up alone: its own backward",
    ),
    "a frozen layer": (
        lambda: scaled(lambda n: n == "norm", 0.0),
        "norm",
        "norm alone: has a gradient on one side only",
    ),
    "a detached block": (
        lambda: detached(1),
        "embedding",
        "nothing after it: the backward pass is detached between it and blocks.1",
    ),
    "a wrong backward": (
        lambda: scaled(lambda n: n.startswith(("embedding", "positions", "blocks.0")), -1.0),
        "embedding",
        "nothing after it: the backward pass is wrong between it and blocks.1",
    ),
    "all layers": (
        lambda: scaled(lambda n: True, 0.25),
        "embedding",
        r"0.25 times a's: b divides by the number of sequences \(4\)",
    ),
    "some layers": (lambda: scaled(lambda n: n.endswith("qkv"), 3.0), "blocks.0.qkv", "2 of 16 parameters, no pattern"),
}


@pytest.mark.parametrize("what", GRADIENTS)
def test_causes_of_gradients(what: str) -> None:
    """Each planted change of a gradient is named, with the first layer in forward order."""
    make, first, words = GRADIENTS[what]
    result = found(make(), other=TorchBackend(TinyLM()))
    assert result.first is not None
    assert (result.first.stage, result.first_layer) == ("gradient", first)
    assert re.search(words, result.cause), result.cause
    assert first in str(result)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": lambda x: 3 * x}, "times that by a's: the learning rate"),
        ({"eps": 1e3}, "eps|learning rate"),
    ],
)
def test_causes_of_updates(changed: dict[str, Any], words: str) -> None:
    """Each planted change of the optimizer is named."""
    result = found(stepping(FakeBackend(), **changed))
    assert result.first is not None
    assert result.first.stage == "update"
    assert re.search(words, result.cause), result.cause


def test_factors_are_named_by_what_is_counted() -> None:
    """A factor is put down to a count of the data only where one fits."""
    counts = counts_of(WEIGHTED)
    assert counts["trained tokens"] == 31
    assert counts["the sum of the weights"] == 15.5
    assert named_factor(1 / 15.5, counts) == "b divides by the sum of the weights (15.5), and a does not"
    assert named_factor(31 / 35, counts) == "b divides by tokens (35) where a divides by trained tokens (31)"
    assert named_factor(0.777, counts).startswith("a normalisation")

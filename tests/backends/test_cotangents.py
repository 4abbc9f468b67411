"""The cotangent of a call: what counts as trained by it, what is logged of it, and what a user's function must return."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import make_data
from hypothesis import given, settings
from hypothesis import strategies as st
from reads import pretend_device
from torch import Tensor

from pullback.backends import AdamParams, Backend, FakeBackend, TorchBackend
from pullback.backends.calls.cotangents import evaluate, evaluate_all, signal_metrics, summarize
from pullback.backends.calls.prepared import prepare
from pullback.datums import Datum
from pullback.errors import DatumError, LossTypeError, NonFiniteError, NotDifferentiableError
from pullback.losses import GRPO, GSPO, CrossEntropy, TokenBatch
from pullback.testing import TinyLM

LENGTHS = (3, 2, 4)
DATA = make_data(list(LENGTHS))
TRAINED = sum(int((datum.loss_fn_inputs["weights"].to_torch() != 0).sum()) for datum in DATA)
SLOPES = st.lists(st.sampled_from([0.0, 0.0, 0.0, -1.5, 2.0, -0.25]), min_size=sum(LENGTHS), max_size=sum(LENGTHS))


def linear(slopes: list[float]) -> Any:
    """A loss whose cotangent is known: the sum of slope times log-prob."""
    rows = torch.tensor(slopes).split(LENGTHS)

    def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        pairs = zip(rows, logprobs, strict=True)
        return torch.stack([(row.to(x.dtype) * x).sum() for row, x in pairs]).sum(), {"mine": 3.0}

    return loss


@given(slopes=SLOPES)
def test_what_has_no_gradient_does_not_count(slopes: list[float]) -> None:
    """Tokens and sequences are those with a cotangent that is not zero, of either sign; and so a step is divided."""
    rows = [row.tolist() for row in torch.tensor(slopes).split(LENGTHS)]
    tokens, sequences = sum(x != 0 for row in rows for x in row), sum(any(row) for row in rows)
    for mode, count in (("num_loss_tokens", tokens), ("num_sequences", sequences)):
        backend = FakeBackend()
        found = backend.forward_backward_custom(DATA, linear(slopes)).result()
        assert found.metrics["tokens_with_gradient:sum"] == tokens
        assert found.metrics["cotangent_abs:mean"] == pytest.approx(sum(map(abs, slopes)) / len(slopes))
        assert found.metrics["mine"] == 3.0
        step = backend.optim_step(AdamParams(), mode).result()  # type: ignore[arg-type]
        assert step.stepped == (tokens > 0)
        if step.stepped:
            assert step.divided_by == count


@given(slopes=st.lists(SLOPES, min_size=3, max_size=3))
def test_candidates_of_one_token_are_one_token(slopes: list[list[float]]) -> None:
    """Where a position has several targets, it counts once, as it does in a mean over tokens."""
    rows = torch.tensor(slopes).T.split(LENGTHS)  # [T, 3] each
    wide = [
        Datum(d.model_input, {"target_tokens": torch.zeros(n, 3).long()}) for d, n in zip(DATA, LENGTHS, strict=True)
    ]

    def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack([(row.to(x.dtype) * x).sum() for row, x in zip(rows, logprobs, strict=True)]).sum(), {}

    backend = FakeBackend()
    found = backend.forward_backward_custom(wide, loss).result()
    tokens = sum(any(slope != 0 for slope in position) for row in rows for position in row.tolist())
    assert found.metrics["tokens_with_gradient:sum"] == tokens
    step = backend.optim_step(AdamParams(), "num_loss_tokens").result()
    assert step.divided_by == tokens


@pytest.mark.parametrize("make", [FakeBackend, lambda: TorchBackend(TinyLM())])
@settings(max_examples=10)
@given(datum=st.integers(0, 2), token=st.integers(0, 1))
def test_infinite_cotangents_add_nothing(make: Callable[[], Backend], datum: int, token: int) -> None:
    """Where a root has its corner the loss is finite and its slope is not: on every backend that is said of the token."""

    def corner(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        one = logprobs[datum][token]
        return (one - one.detach()).sqrt(), {}

    backend = make()
    backend.forward_backward(DATA, "cross_entropy").result()
    before = backend.gradients()
    with pytest.raises(NonFiniteError, match=f"datum {datum}: corner has the gradient inf at target token {token} "):
        backend.forward_backward_custom(DATA, corner).result()
    assert all(torch.equal(gradient, before[name]) for name, gradient in backend.gradients().items())
    assert math.isfinite(backend.optim_step(AdamParams()).result().metrics["grad_norm"])


@given(slopes=SLOPES)
def test_the_cotangent_of_a_function(slopes: list[float]) -> None:
    """It is the derivative for each log-prob, zeros where there is no path, by datum; nothing is divided."""
    rows = torch.tensor(slopes, dtype=torch.float64).split(LENGTHS)
    logprobs = [torch.full((n,), -1.0, dtype=torch.float64) for n in LENGTHS]
    found = evaluate_all(prepare(DATA, linear(slopes)), logprobs)
    assert [found.by_datum[i].tolist() for i in range(3)] == [row.tolist() for row in rows]
    assert (found.denominator, found.count) == ("none", 1.0)
    assert found.metrics["loss"].value == pytest.approx(-sum(slopes))
    assert found.metrics["loss"].reduction == "sum"
    assert dict(found.own) == {"mine": 3.0}

    def first_only(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return logprobs[0].sum(), {}

    partial = evaluate_all(prepare(DATA, first_only), logprobs)
    assert [set(c.tolist()) for c in partial.by_datum.values()] == [{1.0}, {0.0}, {0.0}]
    assert (partial.tokens, partial.sequences) == (3, 1)


def test_parts_of_a_call_add_up() -> None:
    """Datums by themselves, in any order, have the cotangents that they have together; a mean waits, with its share."""
    logprobs = {i: torch.linspace(-2, -1, n, dtype=torch.float64) for i, n in enumerate(LENGTHS)}
    call = prepare(DATA, GRPO(), by_name=False)
    whole = evaluate(call, logprobs)
    parts = [evaluate(call, {i: logprobs[i] for i in chosen}) for chosen in ((2, 0), (1,))]
    together = {i: c for part in parts for i, c in part.by_datum.items()}
    for i, cotangent in whole.by_datum.items():
        assert torch.allclose(together[i], cotangent, rtol=1e-12, atol=0)
    assert whole.denominator == "tokens"
    assert sum(part.count for part in parts) == whole.count == TRAINED
    assert summarize(parts) == pytest.approx(summarize([whole]), rel=1e-6)  # the advantages are summed in fp32
    grown = {i: x.clone().requires_grad_() * 1.0 for i, x in logprobs.items()}
    again = evaluate(call, grown)  # log-probs with a graph: none of it is walked here
    assert all(torch.equal(again.by_datum[i], cotangent) for i, cotangent in whole.by_datum.items())
    given_total = replace(call, counts={"tokens": 100.0})
    divided = evaluate(given_total, logprobs)
    assert (divided.denominator, divided.count) == ("none", 1.0)
    for i, cotangent in whole.by_datum.items():
        assert torch.allclose(divided.by_datum[i] * 100.0, cotangent, rtol=1e-12, atol=0)


def test_a_loss_sees_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a loss does with the log-probs, it cannot walk into the model that they come from."""
    seen: list[Tensor] = []

    def look(loss: CrossEntropy, batch: TokenBatch) -> tuple[()]:
        seen.append(batch.logprobs)
        return ()

    monkeypatch.setattr(CrossEntropy, "problems", look)
    grown = {i: (-torch.ones(n, requires_grad=True)) * 1.0 for i, n in enumerate(LENGTHS)}
    evaluate(prepare(DATA, CrossEntropy()), grown)
    assert [(x.is_leaf, x.requires_grad) for x in seen] == [(True, True)]


def test_what_a_device_hides_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem that could not be looked at during the loss is raised before its cotangent is used."""
    logprobs = {i: torch.full((n,), -1.0) for i, n in enumerate(LENGTHS)}
    sound, unequal = prepare(DATA, CrossEntropy()), prepare(DATA, GSPO(aggregation="sequence_mean", form="sequence"))
    for device in (False, True):
        if device:
            pretend_device(monkeypatch)
        evaluate(sound, logprobs)
        with pytest.raises(DatumError, match="form='token'"):
            evaluate(unequal, logprobs)


def test_signal_metrics_are_over_all_tokens() -> None:
    """The mean of the absolute cotangents of several parts, and how many are not zero."""
    logprobs = [torch.full((n,), -1.0) for n in LENGTHS]
    one = evaluate_all(prepare(DATA, linear([0.0] * 8 + [-2.0])), logprobs)
    two = evaluate_all(prepare(DATA, CrossEntropy()), logprobs)
    found = signal_metrics([one, two])
    assert found["cotangent_abs"].value == pytest.approx((2.0 + TRAINED) / (2 * sum(LENGTHS)))
    assert found["tokens_with_gradient"].value == 1 + TRAINED


def test_what_a_function_must_return(caplog: pytest.LogCaptureFixture) -> None:
    """A scalar with a path to the log-probs and a mapping; each breach is told apart."""
    logprobs = [torch.full((n,), -1.0) for n in LENGTHS]

    def returning(make: Any) -> Any:
        return prepare(DATA, lambda data, leaves: make(leaves))

    breaches: list[tuple[Any, type[Exception], str]] = [
        (lambda x: x[0].sum(), LossTypeError, "must return .*got Tensor$"),
        (lambda x: (x[0].sum(),), LossTypeError, "got tuple of 1"),
        (lambda x: (x[0].sum(), {}, {}), LossTypeError, "got tuple of 3"),
        (lambda x: [x[0].sum(), {}], LossTypeError, "got list$"),
        (lambda x: (1.0, {}), LossTypeError, "a float as loss"),
        (lambda x: (x[0], {}), LossTypeError, r"shape \(3,\)"),
        (lambda x: (x[0].sum(), [1]), LossTypeError, "list as metrics"),
        (lambda x: (x[0].sum().detach(), {}), NotDifferentiableError, "does not depend"),
        (lambda x: (torch.ones((), requires_grad=True) * 2, {}), NotDifferentiableError, "does not depend"),
        (lambda x: (x[0].sum() * math.inf, {}), NonFiniteError, "-inf"),
    ]
    for make, kind, words in breaches:
        with pytest.raises(kind, match=words):
            evaluate_all(returning(make), logprobs)
    with caplog.at_level(logging.WARNING):
        found = evaluate_all(returning(lambda x: (x[0].sum(), {"text": "no number", "at": x[0].sum()})), logprobs)
    assert math.isnan(found.own["text"])
    assert found.own["at"] == -3.0
    assert "'text' is no number but str" in caplog.text

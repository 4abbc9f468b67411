"""A loss with the totals of its step: what it gives, and which totals it refuses before any batch is there."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pullback.errors import ConfigError
from pullback.losses import AGGREGATIONS, DPO, ORPO, CrossEntropy, Loss, TokenBatch
from pullback.losses.base import GradientKind
from pullback.losses.evaluation.terms import Summand, TokenTerm
from pullback.losses.functional import nll
from pullback.testing import Case, CaseSequence


def test_a_call_is_averaged_over_too() -> None:
    """As a function of datums a counted loss is multiplied once by what the trainer divides by; wrong totals fail at once."""
    s = CaseSequence([-1.0, -2.0], [1.0, 1.0], [1.0, -1.0], [-1.1, -2.0], [-1.0, -2.0], [-1.0, -1.0])
    data, leaves = Case((s, s)).datums()
    loss = CrossEntropy("token_mean")
    value, metrics = loss.with_counts(averaged_over=4, tokens=12.0)(data, leaves)
    assert value.item() == pytest.approx(4 * 6.0 / 12.0)
    assert torch.autograd.grad(value, leaves)[0].tolist() == pytest.approx([-4 / 12] * 2)
    assert metrics["nll:mean"] == pytest.approx(1.5)
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        loss.with_counts(token=12.0)


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_wrong_averages(times: Any) -> None:
    """What a trainer averages over is a positive whole number."""
    with pytest.raises(ConfigError, match="averaged_over"):
        CrossEntropy("token_mean").with_counts(averaged_over=times, tokens=8.0)


@pytest.mark.parametrize(
    ("loss", "given", "words"),
    [
        (
            CrossEntropy("token_mean"),
            ["sequences"],
            "cross_entropy is divided by tokens, but .* of sequences: write",
        ),
        (
            CrossEntropy("token_mean"),
            [],
            r"cross_entropy is divided by tokens, but .* of nothing: .*\(tokens=\.\.\.\)",
        ),
        (
            CrossEntropy("token_mean"),
            ["tokens", "pairs"],
            "divided by tokens, but the totals given are of pairs, tokens",
        ),
        (CrossEntropy(), ["tokens"], "cross_entropy is divided by nothing, .* of tokens: it is a sum"),
        (DPO(), ["tokens"], "dpo is divided by pairs, .* of tokens"),
        (
            ORPO(nll="token_mean"),
            ["pairs"],
            r"orpo is divided by pairs, tokens, .* of pairs: write with_counts\(pairs=",
        ),
        (
            ORPO(nll="token_mean", aggregation="sum"),
            ["pairs", "tokens"],
            "orpo is divided by tokens, .* of pairs, tokens",
        ),
    ],
)
def test_totals_of_something_else_are_refused_at_once(loss: Loss, given: list[str], words: str) -> None:
    """Before any batch, with the loss, what it is divided by and what was given; the right ones are taken."""
    with pytest.raises(ConfigError, match=words):
        loss.with_counts(**dict.fromkeys(given, 8.0))
    loss.with_counts(**dict.fromkeys(loss.denominators, 8.0))


class TwoMeans(Loss):
    """A loss of another package, whose second term has an aggregation that the class does not tell."""

    name: ClassVar[str] = "two_means"
    aggregation = "token_mean"
    gradient_kind: ClassVar[GradientKind] = "batch"
    required_inputs: ClassVar[tuple[str, ...]] = ()

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        return tuple(TokenTerm(name, nll, (), AGGREGATIONS[name]) for name in ("token_mean", "weighted_mean"))


def test_further_totals_of_other_losses_are_left_to_the_batch() -> None:
    """A second denominator is known from the terms only; the first is asked for at once, one of neither is refused later."""
    batch = TokenBatch.from_packed(torch.full((3,), -1.0), [3])
    share = TwoMeans().with_counts(tokens=6.0, weight_sum=6.0)
    assert share.evaluate(batch).item() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="two_means is divided by tokens, but the totals given are of weight_sum"):
        TwoMeans().with_counts(weight_sum=6.0)
    with pytest.raises(
        ConfigError, match="divided by tokens, weight_sum, but the totals given are of pairs, tokens, weight_sum"
    ):
        TwoMeans().with_counts(tokens=6.0, weight_sum=6.0, pairs=2.0).evaluate(batch)


def test_a_share_is_a_tensor_and_its_metrics_are_the_losses() -> None:
    """As the page says: the loss of the same counts has the same value, with metrics."""
    batch = TokenBatch.from_packed(torch.full((3,), -1.0), [3])
    share = CrossEntropy("token_mean").with_counts(tokens=6.0)
    output = share.loss.evaluate(batch, counts=share.counts)
    assert isinstance(share.evaluate(batch), Tensor)
    assert torch.equal(output.loss, share.evaluate(batch))
    assert output.metrics["nll"].value == pytest.approx(1.0)

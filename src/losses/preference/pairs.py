"""What all losses of pairs share: the responses they refuse, and what to log of a margin."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ...errors import EmptyUnitError, InvalidDatumsError
from ..batch.problems import Problem
from ..batch.selection import readable
from ..batch.token_batch import TokenBatch
from ..batch.values import LARGEST_LOGPROB
from ..evaluation.metrics import DeferredMetric, mean
from ..evaluation.pair_terms import Responses, known_positive_weights

__all__ = ["MEANS", "empty_responses", "margin_metrics", "responses_without_mean", "wrong_reference_sums"]

MEANS: Final = Responses(mean=True)  # the weighted mean log-probs


def empty_responses(batch: TokenBatch, name: str) -> Problem | None:
    """Return the problem of a response without a trained token."""
    if _surely_trained(batch):
        return None
    members, tokens = torch.cat(batch.pairs), batch.tokens_per_sequence

    def error() -> EmptyUnitError:
        empty = sorted(members[tokens[members] == 0].tolist())
        return EmptyUnitError(f"{name}: sequences {empty} have no trained token; every response needs one")

    return Problem((tokens[members] == 0).any(), error)


def responses_without_mean(batch: TokenBatch, name: str) -> tuple[Problem | None, ...]:
    """Return the problems of a response that has no mean log-prob: nothing is trained, or the weights have no positive sum."""
    if known_positive_weights(batch):
        return ()
    members, weight = torch.cat(batch.pairs), batch.weight_per_sequence

    def error() -> EmptyUnitError:
        without = sorted(members[weight[members] <= 0].tolist())
        return EmptyUnitError(
            f"{name}: every response needs weights with a positive sum, to take a mean log-prob; sequences {without} lack it"
        )

    return empty_responses(batch, name), Problem((weight[members] <= 0).any(), error)


def wrong_reference_sums(batch: TokenBatch) -> Problem | None:
    """Return the problem of sums of the reference's log-probs that are none: not finite, or positive."""
    sums = batch.ref_logprob_sums
    if sums is None:
        return None
    # A sum of log-probs is at most 0, if no weight is negative.
    positive = (sums > LARGEST_LOGPROB * batch.weight_per_sequence.clamp(min=1)) & (batch.weight.amin() >= 0)
    wrong = ~torch.isfinite(sums) | positive

    def error() -> InvalidDatumsError:
        return InvalidDatumsError(
            [
                f"sequence {i}: ref_logprob_sums is {float(sums[i]):g}; the sum of a reference's log-probs over the trained "
                "tokens is a finite number of at most 0 (not a mean, nor a negative log-likelihood)"
                for i in wrong.nonzero()[:, 0].tolist()
            ]
        )

    return Problem(wrong.any(), error)


def margin_metrics(margin: Tensor) -> dict[str, DeferredMetric]:
    """Return the mean margin and the accuracy; ties count as half, as at policy = reference every margin is 0."""
    accuracy = 0.5 + 0.5 * margin.sign()
    return {"margin": mean(margin), "accuracy": mean(accuracy)}


def _surely_trained(batch: TokenBatch) -> bool:
    """Return whether every sequence has a trained token, as far as that can be seen for nothing."""
    if not readable(batch.weight):
        return False
    return all(batch.weight_per_sequence.tolist())  # a sum that is not 0 has an entry that is not 0

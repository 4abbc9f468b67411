"""What all losses of pairs share: the responses they refuse, and what to log of a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import EmptyUnitError
from ..batch.problems import Problem
from ..batch.selection import readable
from ..batch.token_batch import TokenBatch
from ..evaluation.metrics import Unread, mean

__all__ = ["by_pair", "empty_responses", "margin_metrics", "mean_logprobs", "weightless_responses"]


def empty_responses(batch: TokenBatch, name: str) -> Problem | None:
    """Return the problem of a response without a trained token."""
    if _surely_trained(batch):
        return None
    members, tokens = torch.cat(batch.pairs), batch.tokens_per_sequence

    def error() -> EmptyUnitError:
        empty = sorted(members[tokens[members] == 0].tolist())
        return EmptyUnitError(f"{name}: sequences {empty} have no trained token; every response needs one")

    return Problem((tokens[members] == 0).any(), error)


def weightless_responses(batch: TokenBatch, name: str) -> Problem | None:
    """Return the problem of a response whose weights have no positive sum, so that it has no mean log-prob."""
    weight = batch.weight_per_sequence
    if readable(weight) and bool((weight > 0).all()):
        return None
    members = torch.cat(batch.pairs)

    def error() -> EmptyUnitError:
        without = sorted(members[weight[members] <= 0].tolist())
        return EmptyUnitError(
            f"{name}: every response needs weights with a positive sum, to take a mean log-prob; sequences {without} lack it"
        )

    return Problem((weight[members] <= 0).any(), error)


def by_pair(batch: TokenBatch, per_sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of the chosen and those of the rejected sequences, [P] each, of one number per sequence, [B]."""
    pairs = batch.pairs
    if batch.role is None:  # neighbours
        chosen, rejected = per_sequence.view(-1, 2).unbind(1)
        return chosen, rejected
    return per_sequence[pairs.chosen], per_sequence[pairs.rejected]


def mean_logprobs(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return the weighted mean log-probs of chosen and rejected responses; float64 [P] each, differentiable."""
    weight = batch.weight_per_sequence
    return by_pair(batch, batch.weighted_row_sum() / torch.where(weight > 0, weight, 1.0))


def margin_metrics(margin: Tensor) -> dict[str, Unread]:
    """Return the mean margin and the accuracy; ties count as half, as at policy = reference every margin is 0."""
    accuracy = 0.5 + 0.5 * margin.sign()
    return {"margin": mean(margin), "accuracy": mean(accuracy)}


def _surely_trained(batch: TokenBatch) -> bool:
    """Return whether every sequence has a trained token, as far as that can be seen for nothing."""
    if not readable(batch.weight):
        return False
    return bool((batch.weight_per_sequence != 0).all())  # a sum that is not 0 has an entry that is not 0

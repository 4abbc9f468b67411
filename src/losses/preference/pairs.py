"""What all losses of pairs share: the responses they refuse, and what to log of a margin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...errors import EmptyUnitError
from ..batch import TokenBatch
from ..metrics import Metric, mean

__all__ = ["PairAggregation", "margin_metrics", "refuse_empty"]

PairAggregation = Literal["pair_mean", "sum"]


def refuse_empty(batch: TokenBatch, name: str) -> None:
    """Check that every response of every pair has a trained token.

    Raises:
        EmptyUnitError: names the loss and the sequences that have none.
    """
    members = torch.cat(batch.pairs)
    empty = members[batch.tokens_per_sequence[members] == 0]
    if empty.numel():
        raise EmptyUnitError(
            f"{name}: sequences {sorted(empty.tolist())} have no trained token; every response needs one"
        )


def margin_metrics(margin: Tensor) -> dict[str, Metric]:
    """Return the mean margin and the accuracy; ties count as half, as at policy = reference every margin is 0."""
    accuracy = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {"margin": mean(margin), "accuracy": mean(accuracy)}

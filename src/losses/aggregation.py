"""Aggregation: local coefficients and one denominator.

A loss is ``sum_u c_u * w_u * value_u / D``. The coefficient c_u depends on one unit only (a token's sequence
or group); D is one global count. On a backend D is deferred: it is divided out once, by the total over all
calls, so one call or seven give the same update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from ..errors import ConfigError, suggestion
from .batch import TokenBatch

__all__ = ["AGGREGATIONS", "Aggregation", "Denominator", "count_units", "fixed_length"]

Denominator = Literal["tokens", "weight_sum", "sequences", "pairs", "groups", "none"]
Local = Literal["one", "sequence", "group", "fixed"]


@final
@dataclass(frozen=True)
class Aggregation:
    """How unreduced values become one number.

    Args:
        name: what users call it.
        local: coefficient of a token: ``one`` (1), ``sequence`` (1 / trained tokens of its sequence), ``group``
            (1 / trained tokens of its prompt group) or ``fixed`` (1 / ``length``).
        denominator: what the sum is divided by: trained tokens, the sum of the weights, sequences with a trained
            token, pairs, groups with a trained token, or nothing.
        length: the constant of ``fixed``, tokens.
    """

    name: str
    local: Local
    denominator: Denominator
    length: float = 1.0

    @property
    def is_mean(self) -> bool:
        """True if something is divided: a second normalisation on top would be one too many."""
        return self.denominator != "none"

    def coefficients(self, batch: TokenBatch) -> Tensor:
        """Return c for every token; float64 [N]."""
        ones = torch.ones(batch.logprobs.shape[0], dtype=torch.float64, device=batch.logprobs.device)
        match self.local:
            case "sequence":
                return ones / batch.tokens_per_sequence.clamp(min=1)[batch.sequence_index]
            case "group":
                return ones / _tokens_per_group(batch).clamp(min=1)[batch.groups.index][batch.sequence_index]
            case "fixed":
                return ones / self.length
            case _:
                return ones

    @classmethod
    def of(cls, given: Aggregation | str) -> Aggregation:
        """Return ``given``, looked up by name if it is a string.

        Raises:
            ConfigError: no aggregation has that name.
        """
        if isinstance(given, Aggregation):
            return given
        if given not in AGGREGATIONS:
            known = ", ".join(AGGREGATIONS)
            raise ConfigError(f"unknown aggregation {given!r}{suggestion(given, AGGREGATIONS)}; known: {known}")
        return AGGREGATIONS[given]


def fixed_length(length: float) -> Aggregation:
    """Token sums divided by a constant length, averaged over sequences (Dr. GRPO, arXiv:2503.20783, section 3).

    Args:
        length: tokens; usually the generation limit. Must not depend on the batch.
    """
    if not length > 0:
        raise ConfigError(f"fixed_length needs a positive number of tokens, got {length}")
    return Aggregation("fixed_length", "fixed", "sequences", float(length))


AGGREGATIONS: Final[dict[str, Aggregation]] = {
    a.name: a
    for a in (
        Aggregation("sum", "one", "none"),
        Aggregation("token_mean", "one", "tokens"),
        Aggregation("weighted_mean", "one", "weight_sum"),
        Aggregation("sequence_mean_token_mean", "sequence", "sequences"),
        Aggregation("sequence_mean_token_sum", "one", "sequences"),
        Aggregation("group_mean_token_mean", "group", "groups"),
        Aggregation("pair_mean", "one", "pairs"),
    )
}


def count_units(batch: TokenBatch, denominator: Denominator, where: Tensor | None = None) -> float:
    """Count what ``denominator`` names in ``batch``, over the tokens of ``where`` (bool [N]) if it is given."""
    kept = batch.trained_positions if where is None else batch.trained_positions & where
    match denominator:
        case "tokens":
            return float(kept.sum())
        case "weight_sum":
            return float(batch.weight.double()[kept].sum())
        case "sequences":
            return float(torch.unique(batch.sequence_index[kept]).numel())
        case "pairs":
            return float(batch.pairs.chosen.numel())
        case "groups":
            return float(torch.unique(batch.groups.index[batch.sequence_index[kept]]).numel())
        case "none":
            return 1.0


def _tokens_per_group(batch: TokenBatch) -> Tensor:
    index, count = batch.groups.index, batch.groups.count
    return batch.tokens_per_sequence.new_zeros(count).index_add(0, index, batch.tokens_per_sequence)

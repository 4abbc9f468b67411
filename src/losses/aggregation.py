"""Aggregation: local coefficients and one denominator.

A loss is ``sum_u c_u * w_u * value_u / D``. The coefficient c_u depends on one unit only (a token's sequence
or group); D is one global count. On a backend D is deferred: it is divided out once, by the total over all
calls, so one call or seven give the same update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, EmptyUnitError
from .batch import TokenBatch
from .checks import choice, number

__all__ = ["AGGREGATIONS", "Aggregation", "Denominator", "Unit", "count_units", "fixed_length"]

Denominator = Literal["tokens", "weight_sum", "sequences", "pairs", "groups", "none"]
Local = Literal["one", "sequence", "group", "fixed"]
Unit = Literal["token", "pair"]


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

    Raises:
        ConfigError: a field is none of these.
    """

    name: str
    local: Local
    denominator: Denominator
    length: float = 1.0

    def __post_init__(self) -> None:
        choice("aggregation local", self.local, get_args(Local))
        choice("aggregation denominator", self.denominator, get_args(Denominator))
        number("aggregation length", self.length, low=0.0)

    @property
    def is_mean(self) -> bool:
        """True if something is divided: a second normalisation on top would be one too many."""
        return self.denominator != "none"

    def fits(self, unit: Unit) -> bool:
        """Return whether values of that unit can be put together so."""
        if unit == "pair":
            return self.local == "one" and self.denominator in ("pairs", "none")
        return self.denominator != "pairs"

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

    def weighted_coefficients(self, batch: TokenBatch) -> Tensor:
        """Return ``c_u w_u``, what each token's value is multiplied by; float64, shape of the batch's log-probs."""
        weight, coefficients = batch.weight.double(), self.coefficients(batch)
        return weight * (coefficients if weight.dim() == 1 else coefficients[:, None])

    @classmethod
    def of(cls, value: Aggregation | str, unit: Unit | None = None) -> Aggregation:
        """Return ``value``, looked up by name if it is a string.

        Args:
            value: an aggregation, or the name of one.
            unit: what the loss has one value of, if that is known.

        Raises:
            ConfigError: no aggregation has that name, or it does not fit the unit.
        """
        if not isinstance(value, Aggregation):
            choice("aggregation", value, AGGREGATIONS)
            value = AGGREGATIONS[value]
        if unit is not None and not value.fits(unit):
            fitting = ", ".join(name for name, known in AGGREGATIONS.items() if known.fits(unit))
            raise ConfigError(f"a loss with one value per {unit} is aggregated by one of {fitting}, got {value.name!r}")
        return value


def fixed_length(length: float) -> Aggregation:
    """Return token sums divided by a constant length, averaged over sequences.

    Args:
        length: tokens; usually the generation limit. Must not depend on the batch.

    Raises:
        ConfigError: not a positive, finite number.

    Source: Dr. GRPO, arXiv:2503.20783, section 3.
    """
    return Aggregation(
        "fixed_length", "fixed", "sequences", number("fixed_length, a positive number of tokens,", length, low=0.0)
    )


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
    """Return how many of what ``denominator`` names are in ``batch``.

    Args:
        batch: the tensors.
        denominator: what is counted.
        where: bool [N]; the tokens that count, if not all trained ones.

    Raises:
        EmptyUnitError: the sum of the weights is not positive, though something is trained.
    """
    kept = batch.trained_positions if where is None else batch.trained_positions & where
    match denominator:
        case "tokens":
            return float(kept.sum())
        case "weight_sum":
            return _weight_sum(batch, kept)
        case "sequences":
            return float(torch.unique(batch.sequence_index[kept]).numel())
        case "pairs":
            return float(batch.pairs.chosen.numel())
        case "groups":
            return float(torch.unique(batch.groups.index[batch.sequence_index[kept]]).numel())
        case "none":
            return 1.0


def _weight_sum(batch: TokenBatch, kept: Tensor) -> float:
    weights = float(batch.weight.double()[kept].sum())
    if weights <= 0 and bool(batch.trained.any()):
        raise EmptyUnitError(
            f"weighted_mean divides by the sum of the weights, which is {weights:g}; it must be positive"
        )
    return weights


def _tokens_per_group(batch: TokenBatch) -> Tensor:
    index, count = batch.groups.index, batch.groups.count
    return batch.tokens_per_sequence.new_zeros(count).index_add(0, index, batch.tokens_per_sequence)

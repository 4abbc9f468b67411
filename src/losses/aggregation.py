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

from ..errors import ConfigError
from .batch.token_batch import TokenBatch
from .checks import choice, number, require

__all__ = ["AGGREGATIONS", "Aggregation", "Denominator", "Unit", "fixed_length"]

Denominator = Literal["tokens", "weight_sum", "sequences", "all_sequences", "pairs", "groups", "none"]
Local = Literal["one", "sequence", "group", "fixed"]
Unit = Literal["token", "sequence", "pair"]


@final
@dataclass(frozen=True)
class Aggregation:
    """How unreduced values become one number.

    Args:
        name: what users call it.
        local: coefficient of a token: ``one`` (1), ``sequence`` (1 / trained tokens of its sequence), ``group``
            (1 / trained tokens of its prompt group) or ``fixed`` (1 / ``length``).
        denominator: what the sum is divided by: trained tokens, the sum of the weights, sequences with a trained
            token, all sequences (as some peers do), pairs, groups with a trained token, or nothing.
        length: the constant of ``fixed``, tokens.

    Raises:
        ConfigError: a field is none of these.
    """

    name: str
    local: Local
    denominator: Denominator
    length: float = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.name, str), "aggregation name", "a string", self.name)
        choice("aggregation local", self.local, get_args(Local))
        choice("aggregation denominator", self.denominator, get_args(Denominator))
        number("aggregation length", self.length, low=0.0)

    @property
    def is_mean(self) -> bool:
        """True if something is divided: a second normalisation on top would be one too many."""
        return self.denominator != "none"

    @property
    def by_group(self) -> bool:
        """True if groups are what is counted, or tokens are weighted within each: a group must not be cut."""
        return self.local == "group" or self.denominator == "groups"

    def fits(self, unit: Unit) -> bool:
        """Return whether values of that unit can be put together so."""
        if unit == "token":
            return self.denominator != "pairs" and self.name != "sequence_mean"
        whole = ("all_sequences",) if unit == "sequence" else ()
        return self.local == "one" and self.denominator in (unit + "s", "none", *whole)

    def row_coefficients(self, batch: TokenBatch) -> Tensor | None:
        """Return c for the tokens of every sequence, float64 [B]; None where it is the same for all (`constant`)."""
        match self.local:
            case "sequence":
                return batch.tokens_per_sequence.clamp(min=1).reciprocal()
            case "group":
                groups = batch.groups
                tokens = batch.tokens_per_sequence
                return (
                    torch.zeros_like(tokens).index_add(0, groups.index, tokens).clamp(min=1).reciprocal()[groups.index]
                )
            case _:
                return None

    @property
    def constant(self) -> float:
        """The coefficient that all tokens share: 1, or 1 / ``length``."""
        return 1.0 / self.length if self.local == "fixed" else 1.0

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
            if not isinstance(value, str) or value not in AGGREGATIONS:
                choice("aggregation", value, _fitting(unit))
            value = AGGREGATIONS[value]
        if unit is not None and not value.fits(unit):
            fitting = [*_fitting(unit), *(["fixed_length(n)"] if unit == "token" else [])]
            raise ConfigError(
                f"a loss with one value per {unit} is aggregated by one of {', '.join(fitting)}, got {value.name!r}"
            )
        return value


def _fitting(unit: Unit | None) -> list[str]:
    return [name for name, known in AGGREGATIONS.items() if unit is None or known.fits(unit)]


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
        Aggregation("sequence_mean", "one", "sequences"),
    )
}

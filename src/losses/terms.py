"""Terms: a loss's unreduced values, their coefficients, and what their sum is divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final, get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from .aggregation import Aggregation, Denominator, Unit, count_units
from .batch import TokenBatch
from .checks import choice, number

__all__ = ["Counts", "Part", "Term", "check_counts", "given_count", "reduce_term"]

Counts = Mapping[str, float]


@final
@dataclass(frozen=True, eq=False)
class Term:
    """Unreduced values of one summand of a loss.

    Args:
        name: e.g. ``policy`` or ``kl``.
        values: one value per token ([N] or [N, K], 0 where untrained) or per pair ([P]).
        unit: what there is one value of.
        aggregation: how the values are put together.
        scale: the summand's coefficient, e.g. a KL's beta.
        where: bool [N]; the tokens that count, if not all trained ones.

    Raises:
        ConfigError: the unit is unknown, the aggregation does not fit it, or the scale is no finite number.
    """

    name: str
    values: Tensor
    unit: Unit
    aggregation: Aggregation
    scale: float = 1.0
    where: Tensor | None = None

    def __post_init__(self) -> None:
        choice("unit of a term", self.unit, get_args(Unit))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, self.unit))
        number("scale of a term", self.scale)

    def coefficients(self, batch: TokenBatch) -> Tensor:
        """Return ``c_u w_u``, what each value is multiplied by; float64, shape of ``values``."""
        if self.unit == "pair":
            return torch.ones_like(self.values, dtype=torch.float64)
        return self.aggregation.weighted_coefficients(batch)

    def weighed(self, coefficients: Tensor) -> Tensor:
        """Return ``scale * sum_u c_u w_u value_u`` for these coefficients, accumulated in float64."""
        return self.scale * (coefficients * self.values.double()).sum()

    def numerator(self, batch: TokenBatch) -> Tensor:
        """Return ``scale * sum_u c_u w_u value_u``, accumulated in float64."""
        return self.weighed(self.coefficients(batch))


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One term, reduced but not divided: ``numerator / count`` is its share of the loss."""

    name: str
    numerator: Tensor
    denominator: Denominator
    count: float


def reduce_term(term: Term, batch: TokenBatch, counts: Counts | None) -> Part:
    """Return a term's numerator and what it is divided by: the batch's own count, or the one of ``counts``.

    Raises:
        EmptyUnitError: the weights of a weighted mean have no positive sum.
        ConfigError: ``counts`` lacks the denominator that is needed, or it is not positive.
    """
    denominator = term.aggregation.denominator
    count = count_units(batch, denominator, term.where)
    if counts is not None and denominator != "none":
        own, count = count, given_count(term, counts)
        if own > count * (1 + 1e-6):
            raise ConfigError(
                f"counts[{denominator!r}] is {count:g}, but this call alone has {own:g}: give the total of the whole step"
            )
    return Part(term.name, term.numerator(batch), denominator, count)


def given_count(term: Term, counts: Counts) -> float:
    """Return the total that the caller gave for a term's denominator; 1 where nothing is divided.

    Raises:
        ConfigError: it is missing.
    """
    denominator = term.aggregation.denominator
    if denominator == "none":
        return 1.0
    if denominator not in counts:
        raise ConfigError(f"counts lacks {denominator!r}, which term {term.name!r} is divided by; got {dict(counts)}")
    return float(counts[denominator])


def check_counts(counts: object, terms: Sequence[Term] | None = None) -> None:
    """Check totals that the caller gave, before anything is divided by them.

    Args:
        counts: should map denominators to positive numbers; None: nothing was given.
        terms: of the loss, if they are known: a total that none of them is divided by would be ignored.

    Raises:
        ConfigError: it is something else.
    """
    if counts is None:
        return
    if not isinstance(counts, Mapping):
        raise ConfigError(f"counts must map denominators to totals, e.g. {{'tokens': 18231}}, got {counts!r}")
    for name, total in counts.items():
        choice("a key of counts", name, [d for d in get_args(Denominator) if d != "none"])
        number(f"counts[{name!r}]", total, low=0.0)
    used = {term.aggregation.denominator for term in terms or ()} - {"none"}
    unused = sorted(set(counts) - used)
    if terms is not None and unused:
        divides = ", ".join(sorted(used)) or "nothing (it is a sum)"
        raise ConfigError(f"counts has {unused}, but the loss is divided by {divides}: it would be ignored; drop it")

"""Terms: the summands of a loss, as a function of each token or as values of each unit."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final, get_args

import torch
from torch import Tensor

from ...errors import LengthError
from ..aggregation import AGGREGATIONS, Aggregation, Unit
from ..batch.selection import select, wide
from ..batch.sums import scaled
from ..batch.token_batch import TokenBatch
from ..checks import choice, number, require
from ..functional.likelihood import nll
from .token_sum import token_sum, token_values

__all__ = ["Summand", "Term", "TokenTerm", "check_definition"]


def check_definition(definition: object) -> None:
    """Check the definition of a term.

    Raises:
        ConfigError: it cannot be called.
    """
    require(callable(definition), "definition of a term", "a function of log-probs", definition)


class Summand(abc.ABC):
    """One summand of a loss: ``scale * sum_u c_u w_u value_u / D``.

    Attributes:
        name: e.g. ``policy`` or ``kl``.
        aggregation: how the values are put together.
        scale: the summand's coefficient, e.g. a KL's beta.
        where: bool, one per token; the tokens that count, if not all trained ones.
    """

    name: str
    aggregation: Aggregation
    scale: float
    where: Tensor | None

    def _check(self, unit: Unit) -> None:
        """Check the fields of every summand, and look its aggregation up.

        Raises:
            ConfigError: the name is no string, the aggregation does not fit the unit, or the scale is no finite number.
        """
        require(isinstance(self.name, str), "name of a term", "a string", self.name)
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, unit))
        number("scale of a term", self.scale)

    @abc.abstractmethod
    def counting(self, where: Tensor | None) -> Summand:
        """Return the same summand with other tokens that count."""

    @abc.abstractmethod
    def values(self, batch: TokenBatch) -> Tensor:
        """Return the unreduced values, detached: ``value_u``, a `TokenTerm`'s factor in it; 0 where nothing is trained."""

    @abc.abstractmethod
    def numerator(self, batch: TokenBatch, coefficients: Tensor | None = None) -> Tensor:
        """Return ``scale * sum_u c_u w_u value_u``; 0-d, fp32 or better, differentiable in the batch's log-probs.

        Args:
            batch: the tensors that the summand was made of.
            coefficients: c of every token, in place of the aggregation's own, where the batch is only a part of its
                sequences.
        """


@final
@dataclass(frozen=True, eq=False)
class TokenTerm(Summand):
    """A summand with one value per token, ``definition(logprob_t, *args_t)``.

    Args:
        name: e.g. ``policy``.
        definition: a function of `pullback.losses.functional`, or any other pure one; a closed form is used where there is
            one.
        args: its other arguments, constants of the differentiation: numbers, and tensors that broadcast to the log-probs
            (NaN in untrained positions does no harm).
        aggregation: how the values are put together.
        scale: the summand's coefficient.
        factor: a detached weight of each token, e.g. an importance ratio; multiplies the value, not the count.
        where: bool, shape of the log-probs; the tokens that count, if not all trained ones.

    Raises:
        ConfigError: the definition is no function, the aggregation does not fit tokens, or the scale is no finite number.
    """

    name: str
    definition: Callable[..., Tensor]
    args: tuple[Any, ...] = ()
    aggregation: Aggregation = field(
        default_factory=lambda: AGGREGATIONS["sum"]
    )  # a compiler knows no instance as default
    scale: float = 1.0
    factor: Tensor | None = None
    where: Tensor | None = None

    def __post_init__(self) -> None:
        check_definition(self.definition)
        self._check("token")

    def counting(self, where: Tensor | None) -> TokenTerm:
        return replace(self, where=where)

    def values(self, batch: TokenBatch) -> Tensor:
        mask = self._mask(batch)
        with torch.no_grad():
            values = token_values(wide(batch.logprobs.detach()), self.definition, self.args, mask)
            return values if self.factor is None else values * select(self.factor.to(values.dtype), mask)

    def numerator(self, batch: TokenBatch, coefficients: Tensor | None = None) -> Tensor:
        scale = self.scale * self.aggregation.constant
        per_row = self.aggregation.row_coefficients(batch) if coefficients is None else None
        if self.definition is nll and self.factor is None and self.where is None and coefficients is None:
            # Linear in the log-probs: no token's value is needed.
            if per_row is None:
                return scaled(batch.negative_log_likelihood(), scale)
            return (batch.weighted_row_sum() * per_row).sum() * -scale
        factors = [f for f in (batch.scale, self.factor, coefficients) if f is not None]
        if per_row is not None:
            factors.append(batch.layout.spread(per_row, batch.logprobs.dim()))
        x = wide(batch.logprobs)
        factors = [f if f.dtype == x.dtype else f.to(x.dtype) for f in factors]
        return token_sum(x, self.definition, self.args, factors, self._mask(batch), scale)

    def _mask(self, batch: TokenBatch) -> Tensor | None:
        if self.where is None:
            return batch.mask
        return torch.where(self.where, batch.weight, torch.zeros_like(batch.weight))


@final
@dataclass(frozen=True, eq=False)
class Term(Summand):
    """A summand whose values have been computed already, by differentiable operations.

    Args:
        name: e.g. ``dpo``.
        unreduced: one value per token (shape of the log-probs, 0 where untrained), per sequence ([B], 0 where
            nothing of it is trained) or per pair ([P]).
        unit: what there is one value of.
        aggregation: how the values are put together.
        scale: the summand's coefficient.
        where: bool, one per token; the tokens that count, if not all trained ones.

    Raises:
        ConfigError: the values are no tensor, the unit is unknown, the aggregation does not fit it, or the scale is no finite
            number.
        LengthError: (on use) there are more or fewer values than units in the batch.
    """

    name: str
    unreduced: Tensor
    unit: Unit
    aggregation: Aggregation
    scale: float = 1.0
    where: Tensor | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.unreduced, Tensor), "unreduced values of a term", "a tensor", self.unreduced)
        choice("unit of a term", self.unit, get_args(Unit))
        self._check(self.unit)

    def counting(self, where: Tensor | None) -> Term:
        return replace(self, where=where)

    def values(self, batch: TokenBatch) -> Tensor:
        return self.unreduced.detach()

    def numerator(self, batch: TokenBatch, coefficients: Tensor | None = None) -> Tensor:
        self._require_shape(batch)
        scale = self.scale * self.aggregation.constant
        if self.unit != "token":
            return scaled(self.unreduced.sum(dtype=torch.float64), scale)
        per_row = self.aggregation.row_coefficients(batch) if coefficients is None else None
        weighted = self.unreduced.double() * batch.weight
        if per_row is not None:
            weighted = weighted * batch.layout.spread(per_row, weighted.dim())
        return (weighted if coefficients is None else weighted * coefficients).sum(dtype=torch.float64) * scale

    def _require_shape(self, batch: TokenBatch) -> None:
        if self.unit == "token":
            expected = tuple(batch.logprobs.shape)
        elif self.unit == "sequence" or batch.neighbours_are_pairs:
            expected = (batch.num_sequences // (2 if self.unit == "pair" else 1),)
        else:
            expected = (batch.pairs.chosen.shape[0],)
        if tuple(self.unreduced.shape) != expected:
            shape = tuple(self.unreduced.shape)
            raise LengthError(
                f"term {self.name!r} has values of shape {shape}, expected {expected}, one per {self.unit}"
            )

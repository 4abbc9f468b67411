"""Loss: the one abstract class of the library, and what it returns."""

from __future__ import annotations

import abc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ..errors import ConfigError, EmptyUnitError, MissingFieldError, MixedDenominatorsError
from .adapt import batch_from_datums
from .aggregation import Aggregation, Denominator, count_units
from .batch import TokenBatch
from .metrics import Metric, total, wire_metrics

__all__ = ["Counts", "GradientKind", "Loss", "LossOutput", "Normalization", "Part", "Term", "number"]

GradientKind = Literal["constant", "token", "sequence", "pair", "batch"]
Normalization = Literal["num_loss_tokens", "num_sequences"]
Counts = Mapping[str, float]
_logger = logging.getLogger(__name__)


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
    """

    name: str
    values: Tensor
    unit: Literal["token", "pair"]
    aggregation: Aggregation
    scale: float = 1.0
    where: Tensor | None = None

    def numerator(self, batch: TokenBatch) -> Tensor:
        """``scale * sum_u c_u w_u value_u``, accumulated in float64."""
        if self.unit == "pair":
            return self.scale * self.values.double().sum()
        weighted = batch.weight.double() * self.values.double()
        flat = weighted if weighted.dim() == 1 else weighted.sum(-1)
        return self.scale * (self.aggregation.coefficients(batch) * flat).sum()


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One term, reduced but not divided: ``numerator / count`` is its share of the loss."""

    name: str
    numerator: Tensor
    denominator: Denominator
    count: float


@final
@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss, with everything that a trainer may want beside its value.

    Attributes:
        loss: scalar; differentiable with respect to the batch's log-probs. Exactly 0 (and connected) if ``empty``.
        parts: each term's numerator and denominator, for trainers that divide once, later.
        values: unreduced values per term, detached.
        metrics: what to log; combine them with `combine_metrics`.
        empty: True if a denominator is zero, i.e. nothing is trained.
    """

    loss: Tensor
    parts: tuple[Part, ...]
    values: Mapping[str, Tensor]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    empty: bool = False

    def deferred(self) -> Part:
        """Return the sum of all parts, to be divided later by one total count.

        Raises:
            MixedDenominatorsError: the terms have different denominators.
        """
        first, *others = self.parts
        for part in others:
            if (part.denominator, part.count) != (first.denominator, first.count):
                raise MixedDenominatorsError(
                    f"term {first.name!r} is divided by {first.denominator} ({first.count:g}) but {part.name!r} by "
                    f"{part.denominator} ({part.count:g}): one deferred division cannot serve both; give counts={{...}} "
                    "with the totals of the whole step"
                )
        return Part("loss", sum((p.numerator for p in others), first.numerator), first.denominator, first.count)


class Loss(abc.ABC):
    """A loss on per-token log-probs: a frozen dataclass of hyperparameters with one definition of its maths.

    Subclasses are final. They give `terms` (the maths, unreduced), the inputs they need, and `from_config`.
    Everything is minimised.
    """

    name: ClassVar[str]
    gradient_kind: ClassVar[GradientKind]
    sources: ClassVar[tuple[str, ...]]
    aggregation: Aggregation | str

    @property
    @abc.abstractmethod
    def required_inputs(self) -> tuple[str, ...]:
        """Datum keys without which the loss cannot be computed."""

    @property
    @abc.abstractmethod
    def optional_inputs(self) -> tuple[str, ...]:
        """Datum keys that the loss uses where they are given."""

    @final
    @property
    def main_aggregation(self) -> Aggregation:
        """How the loss's first term is put together."""
        return Aggregation.of(self.aggregation)

    @final
    @property
    def normalization(self) -> Normalization | None:
        """The normalisation of ``optim_step`` that fits: None for a mean, a count for a raw sum."""
        if self.main_aggregation.is_mean:
            return None
        return "num_sequences" if self.gradient_kind == "pair" else "num_loss_tokens"

    @classmethod
    @abc.abstractmethod
    def from_config(cls, *args: Any, **config: Any) -> Self:
        """Build from flat keys, as they travel in ``loss_fn_config``; the signature is the list of keys."""

    @abc.abstractmethod
    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        """The loss's maths: unreduced values."""

    @abc.abstractmethod
    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        """The loss's own metrics. Runs without gradients; may fail without harm."""

    @final
    def evaluate(self, batch: TokenBatch, counts: Counts | None = None) -> LossOutput:
        """Compute the loss of a batch of tensors.

        Args:
            batch: the tensors.
            counts: totals of the whole step by denominator, e.g. ``{"tokens": 18231}``, where this batch is only a
                part of it. Absent: the batch's own counts.

        Raises:
            MissingFieldError: the batch lacks an input.
            ConfigError: ``counts`` lacks the denominator that is needed, or it is not positive.
        """
        self._check_inputs(batch)
        terms = self.terms(batch)
        parts = tuple(_reduce(term, batch, counts) for term in terms)
        shares = [p.numerator / p.count if p.count else p.numerator * 0.0 for p in parts]
        loss = sum(shares[1:], shares[0]).to(batch.policy.dtype)
        values = {term.name: term.values.detach() for term in terms}
        return LossOutput(loss, parts, values, self._metrics(batch, terms, parts), any(not p.count for p in parts))

    @final
    def __call__(self, data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of datums and their log-probs: the function that ``forward_backward_custom`` wants.

        Args:
            data: datums, of this library or of any Tinker-shaped SDK.
            logprobs: one tensor [T] per datum, aligned to its target tokens.

        Returns:
            The scalar loss and its metrics as ``{"name:reduction": value}``.

        Raises:
            DatumError: an input is missing, has another length, or a unit is incomplete.
        """
        output = self.evaluate(self.batch(data, logprobs))
        return output.loss, wire_metrics(output.metrics)

    @final
    def batch(self, data: Sequence[Any], logprobs: Sequence[Tensor]) -> TokenBatch:
        """Return the tensors of ``data`` that this loss reads."""
        return batch_from_datums(data, logprobs, self.required_inputs, self.optional_inputs)

    def _check_inputs(self, batch: TokenBatch) -> None:
        for key in self.required_inputs:
            name = "behaviour_logprobs" if key == "logprobs" else key
            if getattr(batch, name) is None:
                raise MissingFieldError(f"missing required field {key!r}: {self.name} needs {name} in its TokenBatch")

    @torch.no_grad()
    def _metrics(self, batch: TokenBatch, terms: tuple[Term, ...], parts: tuple[Part, ...]) -> dict[str, Metric]:
        try:
            found = {"loss": total(sum(p.numerator.detach().item() for p in parts))}
            if all(p.denominator != "none" for p in parts):
                found["loss_per_unit"] = _per_unit(parts)
            found["tokens"] = total(batch.trained_positions.sum())
            found["sequences"] = total(float(batch.num_sequences))
            return found | dict(self.describe(batch, terms))
        except Exception:
            # A metric must never cost a training step (nor hide that it is missing).
            _logger.exception("metrics of %s could not be computed", self.name)
            return {"metrics_failed": total(1.0)}


def _per_unit(parts: tuple[Part, ...]) -> Metric:
    values, count = [p.numerator.detach().item() for p in parts], parts[0].count
    if any(p.count != count for p in parts):
        return Metric(sum(v / p.count for v, p in zip(values, parts, strict=True) if p.count), 1.0, "mean")
    return Metric(sum(values), count, "mean")


def _reduce(term: Term, batch: TokenBatch, counts: Counts | None) -> Part:
    denominator = term.aggregation.denominator
    count = count_units(batch, denominator, term.where)
    if denominator == "weight_sum" and count <= 0 and bool(batch.trained.any()):
        raise EmptyUnitError(
            f"weighted_mean divides by the sum of the weights, which is {count:g}; it must be positive"
        )
    if counts is not None and denominator != "none":
        if denominator not in counts:
            raise ConfigError(
                f"counts lacks {denominator!r}, which term {term.name!r} is divided by; got {dict(counts)}"
            )
        count = float(counts[denominator])
        if not count > 0:
            raise ConfigError(f"counts[{denominator!r}] must be positive, got {count}")
    return Part(term.name, term.numerator(batch), denominator, count)


def number(
    name: str, value: object, *, low: float | None = None, high: float | None = None, strict: bool = True
) -> float:
    """Return ``value`` as a finite float within (low, high), or [low, high] if not ``strict``.

    Raises:
        ConfigError: it is none of that.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    above = low is None or value > low or (not strict and value == low)
    below = high is None or value < high or (not strict and value == high)
    if not (above and below and abs(value) != float("inf")):
        raise ConfigError(f"{name} must be a finite number {_interval(low, high, strict)}, got {value!r}")
    return float(value)


def _interval(low: float | None, high: float | None, strict: bool) -> str:
    words = [f"{'above' if strict else 'at least'} {low:g}"] if low is not None else []
    words += [f"{'below' if strict else 'at most'} {high:g}"] if high is not None else []
    return " and ".join(words)

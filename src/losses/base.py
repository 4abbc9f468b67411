"""Loss: the one abstract class of the library."""

from __future__ import annotations

import abc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ..errors import DatumError, MissingFieldError
from .adapt import batch_field, batch_from_datums
from .aggregation import Aggregation
from .batch import TokenBatch
from .metrics import Metric, total, wire_metrics
from .output import LossOutput
from .terms import Counts, Part, Term, check_counts, reduce_term

__all__ = ["Counts", "GradientKind", "Loss", "LossOutput", "Normalization", "Part", "Term"]

GradientKind = Literal["constant", "token", "sequence", "pair", "batch"]
Normalization = Literal["num_loss_tokens", "num_sequences"]
_logger = logging.getLogger(__name__)


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
        """Return the unreduced values of each summand: the loss's maths."""

    @abc.abstractmethod
    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        """Return the loss's own metrics, from detached tensors; called when they are read, and may fail without harm."""

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
        self.check_inputs(batch)
        return self.assemble(batch, self.terms(batch), counts)

    @final
    def assemble(self, batch: TokenBatch, terms: tuple[Term, ...], counts: Counts | None = None) -> LossOutput:
        """Put the unreduced terms of a batch together: the second half of `evaluate`.

        Raises:
            ConfigError: ``counts`` lacks the denominator that is needed, or it is not positive.
        """
        check_counts(counts, terms)
        parts = tuple(reduce_term(term, batch, counts) for term in terms)
        shares = [p.numerator / p.count if p.count else p.numerator * 0.0 for p in parts]
        loss = sum(shares[1:], shares[0]).to(batch.policy.dtype)
        # Metrics may be read after the backward, so what they need is kept without its graph.
        detached = tuple(replace(term, values=term.values.detach()) for term in terms)
        metrics = partial(
            self._metrics,
            batch.with_logprobs(batch.logprobs.detach()),
            detached,
            tuple(replace(part, numerator=part.numerator.detach()) for part in parts),
        )
        values = {term.name: term.values for term in detached}
        return LossOutput(loss, parts, values, metrics, any(not p.count for p in parts))

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

    @final
    def check_inputs(self, batch: TokenBatch) -> None:
        """Check that the batch has what the loss requires.

        Raises:
            MissingFieldError: it lacks an input.
            DatumError: it is no `TokenBatch`.
        """
        if not isinstance(batch, TokenBatch):
            raise DatumError(f"{self.name} is evaluated on a TokenBatch, got {type(batch).__name__}")
        for key in self.required_inputs:
            name = batch_field(key)
            if getattr(batch, name) is None:
                raise MissingFieldError(f"missing required field {key!r}: {self.name} needs {name} in its TokenBatch")

    @torch.no_grad()
    def _metrics(self, batch: TokenBatch, terms: tuple[Term, ...], parts: tuple[Part, ...]) -> dict[str, Metric]:
        try:
            common = {"loss": total(sum(p.numerator.item() for p in parts))}
            if all(p.denominator != "none" for p in parts):
                common["loss_per_unit"] = _per_unit(parts)
            common["tokens"] = total(batch.trained_positions.sum())
            common["sequences"] = total(float(batch.num_sequences))
            return common | dict(self.describe(batch, terms))
        except Exception:
            # A metric must never cost a training step (nor hide that it is missing).
            _logger.exception("metrics of %s could not be computed", self.name)
            return {"metrics_failed": total(1.0)}


def _per_unit(parts: tuple[Part, ...]) -> Metric:
    values, count = [p.numerator.item() for p in parts], parts[0].count
    if any(p.count != count for p in parts):
        return Metric(sum(v / p.count for v, p in zip(values, parts, strict=True) if p.count), 1.0, "mean")
    return Metric(sum(values), count, "mean")

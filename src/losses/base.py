"""Loss: the one abstract class of the library."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Self, final

from torch import Tensor

from ..errors import ConfigError, DatumError
from .aggregation import Aggregation, Unit
from .batch.adapt import batch_field, batch_from_datums, logprobs_in_place
from .batch.keys import INPUT_KEYS
from .batch.problems import Problem
from .batch.selection import wide
from .batch.token_batch import TokenBatch
from .config import from_wire, unknown_field
from .counting import CountedLoss, totals
from .counts import Counts, require_counts
from .evaluation.evaluate import assemble
from .evaluation.metrics import DeferredMetric, Metric, wire_metrics
from .evaluation.output import LossOutput
from .evaluation.terms import Summand
from .inputs import missing_input

__all__ = ["GradientKind", "Loss", "Normalization"]

GradientKind = Literal["constant", "token", "sequence", "pair", "batch"]
Normalization = Literal["num_loss_tokens", "num_sequences"]
# This package's losses, whose denominators tests compare with their terms.
_OWN: Final = __name__.rpartition(".")[0] + "."


class Loss(abc.ABC):
    """A loss on per-token log-probs: a frozen dataclass of hyperparameters with one definition of its maths.

    Subclasses are final. They give `terms` (the maths, unreduced) and the inputs they need, as class variables or, where
    they depend on a field, as properties. Everything is minimised.

    Attributes:
        name: in the registry.
        sources: papers or pages.
        aggregation: how the first term is put together.
    """

    name: ClassVar[str]
    sources: ClassVar[tuple[str, ...]]
    aggregation: Aggregation | str

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Make a loss of a dataclass of hyperparameters; a keyword that is none of them is refused in words."""
        if "__dataclass_fields__" in cls.__dict__ and cls.__dict__["__dataclass_params__"].init:
            known: Mapping[str, Any] = cls.__dict__["__dataclass_fields__"]
            for name in fields:
                if name not in known:
                    raise unknown_field(cls, name)
        elif cls.__init__ is object.__init__ and (args or fields):
            raise TypeError(f"{cls.__name__} takes no arguments")
        return super().__new__(cls)

    @property
    @abc.abstractmethod
    def gradient_kind(self) -> GradientKind:
        """What a token's gradient depends on: nothing, its own log-prob, its sequence, its pair, or the whole batch."""

    @property
    @abc.abstractmethod
    def required_inputs(self) -> tuple[str, ...]:
        """Datum keys without which the loss cannot be computed."""

    @property
    def unit(self) -> Unit:
        """What there is one value of; a raw sum is divided by the number of these."""
        return "pair" if self.gradient_kind == "pair" else "token"

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Datum keys that the loss uses where they are given."""
        return ()

    @property
    def alternative_inputs(self) -> Mapping[str, str]:
        """Fields of a `TokenBatch` that do as well as a required one: required field -> the other."""
        return {}

    @final
    @property
    def main_aggregation(self) -> Aggregation:
        """How the loss's first term is put together."""
        return Aggregation.of(self.aggregation)

    @property
    def denominators(self) -> frozenset[str]:
        """What the terms are divided by, as far as that is known without a batch."""
        return frozenset({self.main_aggregation.denominator}) - {"none"}

    @final
    @property
    def normalization(self) -> Normalization | None:
        """The normalisation of ``optim_step`` that fits: None for a mean, a count for a raw sum."""
        if self.main_aggregation.is_mean:
            return None
        return "num_loss_tokens" if self.unit == "token" else "num_sequences"

    @classmethod
    def from_config(cls, *args: Any, **config: Any) -> Self:
        """Build from flat keys, as they travel in ``loss_fn_config``; see `pullback.losses.config`.

        Raises:
            ConfigError: a key is unknown, has no effect, or a value is out of range.
        """
        if args:
            raise TypeError(f"{cls.__name__}.from_config takes keys only, got {args}")
        return from_wire(cls, config)

    @abc.abstractmethod
    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        """Return the summands: the loss's maths."""

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        """Return what may be wrong with the values of a batch for this loss; nothing is looked at here."""
        return ()

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric | Metric]:
        """Return the loss's own metrics, from detached tensors; called when they are read, and may fail without harm."""
        return {}

    @final
    def evaluate(self, batch: TokenBatch, counts: Counts | None = None) -> LossOutput:
        """Compute the loss of a batch of tensors. Nothing is read from a device.

        Args:
            batch: the tensors.
            counts: totals of the whole step by denominator, e.g. ``{"tokens": 18231}``, where this batch is only a
                part of it; numbers, or 0-d tensors. Absent: the batch's own counts.

        Returns:
            The loss, to be differentiated, with its metrics, parts and problems.

        Raises:
            MissingFieldError: the batch lacks an input.
            ConfigError: ``counts`` lacks the denominator that is needed, or it is not positive.
            PullbackError: the values of a batch on the CPU are refused; elsewhere see `LossOutput.check`.
        """
        batch = self._ready(batch)
        return assemble(self, batch, self.terms(batch), counts)

    @final
    def undivided(self, batch: TokenBatch) -> LossOutput:
        """Compute the parts of a loss that the caller divides later, by the totals of a step; see `LossOutput.parts`.

        Unlike `evaluate` it does not ask that the batch alone could be divided: the weights of a micro-batch may sum to
        0 or less where those of the step do not.
        """
        batch = self._ready(batch)
        return assemble(self, batch, self.terms(batch), None, divided=False)

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
    def counts(self, data: Sequence[Any]) -> dict[str, float]:
        """Return a step's totals by denominator, before any forward; give them to `evaluate` or `with_counts`.

        Args:
            data: all datums of the step, or all its `TokenBatch`es. Log-probs are not looked at: a batch for counting may
                hold zeros in their place, and needs neither advantages nor the log-probs of other policies. Units that
                belong together, pairs and the groups of a mean by groups, must lie in one batch, and later in one call.

        Returns:
            E.g. ``{"tokens": 18231.0}``; empty for a sum.

        Raises:
            DatumError: an input that decides what counts is missing, or ``data`` is neither.
            IncompleteUnitError: a group lies in two batches.
        """
        if isinstance(data, TokenBatch):
            raise DatumError("counts takes all batches of the step, in a list; for one alone write counts([batch])")
        given = isinstance(data[0], TokenBatch) if data else False
        batches = data if given else [self.batch(data, logprobs_in_place(data))]
        return totals(self, batches)

    @final
    def with_counts(self, *, averaged_over: float = 1, **counts: float | Tensor) -> CountedLoss:
        """Return the loss divided by the totals of a step, for an SDK or trainer that adds up its calls.

        `CountedLoss.evaluate` gives a tensor, and not a `LossOutput`; ``loss.evaluate(batch, counts=...)`` has the metrics.

        Args:
            averaged_over: by how much the trainer divides the gradient once more: the world size of data parallelism
                that averages over ranks, times the accumulation steps of a trainer that averages over them. The loss is
                multiplied by it.
            counts: the totals, by denominator: ``tokens=18231``; see `counts`.

        Raises:
            ConfigError: a total is missing, unknown, not positive, or one that the loss is not divided by.
        """
        counted = CountedLoss(self, counts, averaged_over)
        all_known = type(self).__module__.startswith(_OWN)
        require_counts(self.name, self.denominators, counts, "with_counts", all_known=all_known)
        return counted

    @final
    def check_inputs(self, batch: TokenBatch) -> None:
        """Check that the batch has what the loss requires.

        Raises:
            MissingFieldError: it lacks an input.
            ConfigError: it has an input in two forms.
            DatumError: it is no `TokenBatch`.
        """
        if not isinstance(batch, TokenBatch):
            raise DatumError(
                f"{self.name} is evaluated on a TokenBatch, got {type(batch).__name__}: TokenBatch.from_padded(logprobs, "
                "mask, ...), from_labels or from_packed makes one of tensors; datums go to loss(data, logprobs_list)"
            )
        for key in self.required_inputs:
            name = batch_field(key)
            other = self.alternative_inputs.get(name, name)
            given = [field for field in dict.fromkeys((name, other)) if getattr(batch, field) is not None]
            if len(given) > 1:
                raise ConfigError(f"{self.name} reads {name} or {other}, and the TokenBatch has both: give one of them")
            if not given:
                choice = f"it or {other!r}" if other != name else "it"
                need = f": {self.name} needs {choice} in its TokenBatch ({INPUT_KEYS[key].meaning})"
                raise missing_input(name, batch, need)

    def _ready(self, batch: TokenBatch) -> TokenBatch:
        """Return a copy of the batch, checked, with log-probs in fp32 or better: gradients of its terms meet unrounded.

        What is found out about the log-probs stays with the copy: a caller may write others into the same memory.
        """
        self.check_inputs(batch)
        return batch.with_logprobs(wide(batch.logprobs))

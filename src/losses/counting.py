"""A loss divided by the totals of a whole step, for SDKs and trainers that add up their calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from torch import Tensor

from ..errors import ConfigError, IncompleteUnitError
from .batch.adapt import batch_field
from .batch.token_batch import TokenBatch
from .checks import number
from .counts import Counts, add_counts, check_counts, count_units
from .evaluation.evaluate import Evaluable
from .evaluation.metrics import wire_metrics
from .evaluation.terms import Summand
from .inputs import SEQUENCE_INPUTS, missing_input

__all__ = ["CountedLoss", "totals"]

# Numbers that a value depends on, and a count only where a term chooses its tokens by them.
_VALUES: Final = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs", "reference_point")


def totals(loss: Evaluable, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Return the counts of all batches by denominator; the log-probs are not looked at.

    Raises:
        MissingFieldError: a batch lacks an input that may decide what counts.
        IncompleteUnitError: a mean by groups, and a group lies in two batches.
    """
    groups: set[int] = set()
    counts: list[dict[str, float]] = []
    for batch in batches:
        batch.refresh()
        means, filled = _means(loss, batch)
        if any(term.aggregation.by_group for term in means):
            groups |= _new_groups(loss, batch, groups)
        counts.append(
            {
                term.aggregation.denominator: float(count_units(filled, term.aggregation.denominator, term.where))
                for term in means
            }
        )
    return add_counts(counts)


def _means(loss: Evaluable, batch: TokenBatch) -> tuple[list[Summand], TokenBatch]:
    """Return the terms that are divided by a count, and the batch to count in, with zeros for what no count depends on."""
    absent = _absent(loss, batch)
    zeros: dict[str, Any] = {name: _zeros(name, batch) for name in absent}
    filled = replace(batch, **zeros) if zeros else batch
    means = [term for term in loss.terms(filled) if term.aggregation.is_mean]
    if absent and any(term.where is not None for term in means):
        raise missing_input(absent[0], batch, f": {loss.name} may choose by it what counts")
    return means, filled


def _zeros(name: str, batch: TokenBatch) -> Tensor:
    rows = name in SEQUENCE_INPUTS
    return batch.logprobs.new_zeros((batch.num_sequences,) if rows else batch.logprobs.shape)


def _absent(loss: Evaluable, batch: TokenBatch) -> list[str]:
    """Return the inputs that a loss requires for its value, and that the batch does not have yet."""
    names = {batch_field(key) for key in loss.required_inputs}
    return [name for name in _VALUES if name in names and getattr(batch, name) is None]


def _new_groups(loss: Evaluable, batch: TokenBatch, known: set[int]) -> set[int]:
    """Return the groups of a batch, which is one group of its own where it does not name them."""
    own = set() if batch.group_id is None else set(batch.group_id[batch.tokens_per_sequence > 0].tolist())
    if cut := sorted(own & known):
        raise IncompleteUnitError(
            f"{loss.name}: groups {cut} lie in two of the batches, so that each would weigh its tokens as if they were all; "
            "keep a group in one batch, and give every group of the step an id of its own"
        )
    return own


@final
@dataclass(frozen=True)
class CountedLoss:
    """A loss with the totals of its step; made by `Loss.with_counts`.

    It gives tensors, this call's share of the step's loss. For metrics ask the loss itself:
    ``share.loss.evaluate(batch, counts=share.counts)`` is a `LossOutput`, whose ``loss`` is not yet multiplied by
    ``averaged_over``.

    Args:
        loss: what is divided.
        counts: totals by denominator.
        averaged_over: what the trainer divides by once more; the loss is multiplied by it.

    Raises:
        ConfigError: a total is unknown or not positive, or ``averaged_over`` is no positive whole number.
    """

    loss: Evaluable
    counts: Counts
    averaged_over: float = 1

    def __post_init__(self) -> None:
        check_counts(self.counts)
        number("averaged_over", self.averaged_over, low=1.0, strict=False)
        if self.averaged_over != int(self.averaged_over):
            raise ConfigError(f"averaged_over must be a positive whole number, got {self.averaged_over!r}")

    def __call__(self, data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Compute this call's share of the step's loss; see `Loss.__call__`."""
        output = self.loss.evaluate(self.loss.batch(data, logprobs), self.counts)
        return output.loss * self.averaged_over, wire_metrics(output.metrics)

    def evaluate(self, batch: TokenBatch) -> Tensor:
        """Return this batch's share of the step's loss, times ``averaged_over``; 0-d, to be differentiated.

        Unlike `Loss.evaluate`, which gives a `LossOutput`, this is the tensor itself.
        """
        return self.loss.evaluate(batch, self.counts).loss * self.averaged_over

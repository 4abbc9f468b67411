"""A loss divided by the totals of a whole step, for SDKs and trainers that add up their calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..errors import ConfigError
from .batch.token_batch import TokenBatch
from .checks import number
from .counts import Counts, add_counts, check_counts, count_units
from .evaluation.evaluate import Evaluable
from .evaluation.metrics import wire_metrics

__all__ = ["Counted", "totals"]


def totals(loss: Evaluable, batches: Iterable[TokenBatch]) -> dict[str, float]:
    """Return the counts of all batches by denominator; the log-probs are not looked at."""
    return add_counts(
        {
            term.aggregation.denominator: float(count_units(batch, term.aggregation.denominator, term.where))
            for term in loss.terms(batch)
            if term.aggregation.is_mean
        }
        for batch in batches
    )


@final
@dataclass(frozen=True)
class Counted:
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

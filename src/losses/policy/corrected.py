"""What the policy losses share that may be corrected for the mismatch of sampler and trainer."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import final

from torch import Tensor

from ..base import GradientKind, Loss
from ..batch.problems import Problem
from ..batch.token_batch import TokenBatch
from ..evaluation.metrics import DeferredMetric
from ..parts.correction import Correction

__all__ = ["CorrectedLoss"]


class CorrectedLoss(Loss, abc.ABC):
    """A policy loss with a `Correction`, or none.

    Attributes:
        correction: weight of the step from the sampler to ``old_logprobs``, which is then required; None is no weight.
    """

    correction: Correction | None

    @final
    @property
    def gradient_kind(self) -> GradientKind:
        return "token" if self.correction is None else self.correction.gradient_kind

    @property
    def required_inputs(self) -> tuple[str, ...]:
        return ("advantages", "logprobs") if self.correction is None else ("advantages", *self.correction.inputs)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("weights", "old_logprobs", "group_id") if self.correction is None else ("weights", "group_id")

    @final
    def problems(self, batch: TokenBatch) -> Iterable[Problem]:
        return () if self.correction is None else (self.correction.problems(batch),)

    @final
    def correction_factor(self, batch: TokenBatch) -> Tensor | None:
        """Return the weight of each token, detached; None where nothing is corrected."""
        return None if self.correction is None else self.correction.factor(batch)

    @final
    def correction_metrics(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        """Return what to log of the correction; nothing where there is none."""
        return {} if self.correction is None else self.correction.metrics(batch)

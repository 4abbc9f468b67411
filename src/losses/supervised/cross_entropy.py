"""Cross-entropy: its gradient is known before the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch.token_batch import TokenBatch
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, TokenTerm
from ..functional.likelihood import nll
from ..registry import register

__all__ = ["CrossEntropy"]


@register
@final
@dataclass(frozen=True)
class CrossEntropy(Loss):
    r"""Weighted negative log-likelihood, ``-sum_t w_t logprob_t / D``.

    The gradient with respect to a log-prob is ``-w_t / D``. With [T, K] targets and weights the same sum runs over
    the K candidates too (soft targets). Negative weights are unlikelihood training and pass through.

    Args:
        aggregation: ``sum`` (the default, as the protocol has it), ``token_mean``, ``weighted_mean``,
            ``sequence_mean_token_mean``, ``sequence_mean_token_sum``, ``group_mean_token_mean`` or `fixed_length`.
    """

    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "cross_entropy"
    gradient_kind: ClassVar[GradientKind] = "constant"
    sources: ClassVar[tuple[str, ...]] = ("Tinker training API, losses: cross_entropy",)
    required_inputs: ClassVar[tuple[str, ...]] = ()
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights", "group_id")

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        return (TokenTerm("nll", nll, (), self.main_aggregation),)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        return {"nll": DeferredMetric(batch.negative_log_likelihood(), batch.weight.sum(), "mean")}

"""Importance sampling: the policy gradient on tokens of an older policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch.token_batch import TokenBatch
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, TokenTerm
from ..functional.policy import importance_sampling
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register

__all__ = ["ImportanceSampling"]


@register
@final
@dataclass(frozen=True)
class ImportanceSampling(Loss):
    r"""Importance-weighted policy gradient, ``-sum_t w_t r_t A_t / D`` with ``r = exp(logprob - anchor)``.

    The gradient with respect to a log-prob is ``-w r A / D``. The anchor is ``old_logprobs`` where given, else the
    sampler's ``logprobs``. Log-ratios above 20 continue by the tangent of exp (counted in ``ratio_saturated``).

    Args:
        aggregation: ``sum`` by default, as the protocol has it.
    """

    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "importance_sampling"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("Tinker training API, losses: importance_sampling",)
    required_inputs: ClassVar[tuple[str, ...]] = ("advantages", "logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights", "old_logprobs", "group_id")

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        arguments = (anchor(batch), batch.given("advantages"))
        return (TokenTerm("policy", importance_sampling, arguments, self.main_aggregation),)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        return ratio_metrics(batch, None)

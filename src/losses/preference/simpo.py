"""SimPO: a preference loss on mean log-probs, without a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch.problems import Problem
from ..batch.token_batch import TokenBatch
from ..checks import number
from ..evaluation.metrics import DeferredMetric
from ..evaluation.pair_terms import PairTerm
from ..evaluation.terms import Summand
from ..functional.preference import simpo
from ..registry import register
from .pairs import MEANS, margin_metrics, responses_without_mean

__all__ = ["SimPO"]


@register
@final
@dataclass(frozen=True)
class SimPO(Loss):
    r"""Simple preference optimisation, ``-log sigmoid(z)`` averaged over pairs, ``z = beta (a_chosen - a_rejected) - gamma``.

    a = the weighted mean log-prob of a response. The gradient with respect to a chosen log-prob is
    ``-beta w / sum(w) sigmoid(-z) / pairs``, of a rejected one its opposite.

    Args:
        beta: scale of the reward, > 0.
        gamma: the margin that is asked for, >= 0, in units of the scaled reward.
        aggregation: ``pair_mean`` or ``sum``.

    Raises:
        EmptyUnitError: (on use) a response has no trained token, or its weights have no positive sum.

    Source: SimPO, arXiv:2405.14734, equation 6.
    """

    beta: float = 2.0
    gamma: float = 1.0
    aggregation: Aggregation | str = "pair_mean"

    name: ClassVar[str] = "simpo"
    gradient_kind: ClassVar[GradientKind] = "pair"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2405.14734",)
    required_inputs: ClassVar[tuple[str, ...]] = ("weights",)
    optional_inputs: ClassVar[tuple[str, ...]] = ("pair_id", "role")

    def __post_init__(self) -> None:
        number("beta", self.beta, low=0.0)
        number("gamma", self.gamma, low=0.0, strict=False)
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "pair"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        return (PairTerm("simpo", simpo, MEANS, (self.beta, self.gamma), self.main_aggregation),)

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        return responses_without_mean(batch, self.name)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        chosen, rejected = MEANS.sides(batch)
        return margin_metrics(self.beta * (chosen - rejected) - self.gamma)

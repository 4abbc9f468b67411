"""ORPO: odds-ratio preference optimisation without a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from ..aggregation import AGGREGATIONS, Aggregation
from ..base import GradientKind, Loss
from ..batch.problems import Problem
from ..batch.token_batch import TokenBatch
from ..checks import choice, number
from ..evaluation.metrics import DeferredMetric, mean, total
from ..evaluation.pair_terms import PairTerm
from ..evaluation.terms import Summand, TokenTerm
from ..functional.likelihood import nll
from ..functional.preference import chosen_nll, log_odds_ratio, odds_ratio
from ..registry import register
from .pairs import MEANS, margin_metrics, responses_without_mean

__all__ = ["ORPO"]


@register
@final
@dataclass(frozen=True)
class ORPO(Loss):
    r"""Odds-ratio preference optimisation: NLL of the chosen response and ``-lambda log sigmoid`` of the log odds ratio.

    With a, b the mean log-probs of chosen and rejected and the log odds ``lo(x) = x - log(1 - e^x)``:
    ``-a - lambda log sigmoid(lo(a) - lo(b))``, averaged over pairs. d/da = ``-1 - lambda sigmoid(-z) / (1 - e^a)``,
    d/db = ``lambda sigmoid(-z) / (1 - e^b)``, each times w / sum(w) per token. The factor 1 / (1 - p) is capped at
    p = ``max_prob`` (counted in ``odds_capped``). There is no reference model.

    Args:
        lam: weight of the odds-ratio term, >= 0.
        nll: ``sequence_mean`` (-a per pair, equation 6 of the paper) or ``token_mean`` (over all chosen tokens of the
            step; a second denominator, so a backend asks for ``counts=``).
        max_prob: where the tangent takes over, in (0, 1).
        aggregation: ``pair_mean`` or ``sum``.

    Raises:
        EmptyUnitError: (on use) a response has no trained token, or weights that sum to 0 or less.

    Source: arXiv:2403.07691, equations 6 and 7.
    """

    lam: float = 0.1
    nll: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    max_prob: float = 1.0 - 1e-4
    aggregation: Aggregation | str = "pair_mean"

    name: ClassVar[str] = "orpo"
    gradient_kind: ClassVar[GradientKind] = "pair"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2403.07691",)
    required_inputs: ClassVar[tuple[str, ...]] = ("weights",)
    optional_inputs: ClassVar[tuple[str, ...]] = ("pair_id", "role")

    def __post_init__(self) -> None:
        number("lam", self.lam, low=0.0, strict=False)
        number("max_prob", self.max_prob, low=0.0, high=1.0)
        choice("nll", self.nll, ("sequence_mean", "token_mean"))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "pair"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        odds = PairTerm("odds", odds_ratio, MEANS, (self.max_prob,), self.main_aggregation, self.lam)
        return (self._nll_term(batch), odds)

    @property
    def denominators(self) -> frozenset[str]:
        return super().denominators | ({"tokens"} if self.nll == "token_mean" else set())

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        return responses_without_mean(batch, self.name)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        chosen, rejected = MEANS.sides(batch)
        capped = torch.cat([chosen, rejected]).exp() > self.max_prob
        return {
            **margin_metrics(log_odds_ratio(chosen, rejected, self.max_prob)),
            "nll_chosen": mean(-chosen),
            "nll_rejected": mean(-rejected),
            "odds_capped": total(capped),
        }

    def _nll_term(self, batch: TokenBatch) -> Summand:
        if self.nll == "sequence_mean":
            return PairTerm("nll", chosen_nll, MEANS, (), self.main_aggregation)
        is_chosen = torch.zeros(batch.num_sequences, device=batch.logprobs.device).index_fill(
            0, batch.pairs.chosen, 1.0
        )
        where = batch.layout.spread(is_chosen != 0, batch.logprobs.dim()).expand(batch.layout.shape)
        return TokenTerm("nll", nll, (), AGGREGATIONS["token_mean"], where=where)

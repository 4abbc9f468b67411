"""Preference losses: one value per pair of a chosen and a rejected response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...errors import ConfigError, EmptyUnitError
from ..aggregation import AGGREGATIONS, Aggregation
from ..base import GradientKind, Loss, Term, number
from ..batch import TokenBatch
from ..metrics import Metric, mean, total
from ..numerics import capped_log_odds

__all__ = ["DPO", "ORPO", "dpo_sigmoid", "log_odds_ratio"]

PairAggregation = Literal["pair_mean", "sum"]


def dpo_sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Per-pair loss of a scaled margin z, ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``.

    dL/dz = ``-(1 - e) sigmoid(-z) + e sigmoid(z)``.

    Args:
        margin: beta (h_chosen - h_rejected), [P].
        label_smoothing: e, the assumed rate of flipped labels, in [0, 0.5).

    Source: DPO, arXiv:2305.18290, equation 7; smoothing: E. Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def log_odds_ratio(chosen: Tensor, rejected: Tensor, max_prob: float) -> Tensor:
    """``log odds(p_chosen) - log odds(p_rejected)`` of mean log-probs, [P]; see `capped_log_odds`."""
    return capped_log_odds(chosen, max_prob) - capped_log_odds(rejected, max_prob)


def _pair_aggregation(given: Aggregation | str) -> Aggregation:
    aggregation = Aggregation.of(given)
    if aggregation.name not in ("pair_mean", "sum"):
        raise ConfigError(f"a loss of pairs aggregates by pair_mean or sum, got {aggregation.name!r}")
    return aggregation


def _refuse_empty(batch: TokenBatch, name: str) -> None:
    members = torch.cat(batch.pairs)
    empty = members[batch.tokens_per_sequence[members] == 0]
    if empty.numel():
        raise EmptyUnitError(
            f"{name}: sequences {sorted(empty.tolist())} have no trained token; every response needs one"
        )


@final
@dataclass(frozen=True)
class DPO(Loss):
    r"""Direct preference optimisation, ``-log sigmoid(beta (h_chosen - h_rejected))`` averaged over pairs.

    h = ``sum_t w_t (logprob_t - ref_logprob_t)``, summed in fp64 over each side's own weights. The gradient with respect to a
    chosen log-prob is ``-beta w sigmoid(-z) / pairs``, of a rejected one its opposite. Where policy and reference are
    equal the loss is log 2 and the slope beta / 2.

    Args:
        beta: strength of the tie to the reference, > 0.
        label_smoothing: rate of flipped labels, in [0, 0.5).
        aggregation: ``pair_mean`` or ``sum``.

    Raises:
        EmptyUnitError: (on use) a response has no trained token.

    Source: arXiv:2305.18290, equation 7.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    aggregation: Aggregation | str = "pair_mean"

    name: ClassVar[str] = "dpo"
    gradient_kind: ClassVar[GradientKind] = "pair"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2305.18290",)

    def __post_init__(self) -> None:
        number("beta", self.beta, low=0.0)
        number("label_smoothing", self.label_smoothing, low=0.0, high=0.5, strict=False)
        object.__setattr__(self, "aggregation", _pair_aggregation(self.aggregation))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        return ("weights", "ref_logprobs")

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("pair_id", "role")

    @classmethod
    def from_config(
        cls, *, beta: float = 0.1, label_smoothing: float = 0.0, aggregation: PairAggregation = "pair_mean"
    ) -> Self:
        return cls(beta, label_smoothing, aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        _refuse_empty(batch, self.name)
        rewards = self._rewards(batch)
        chosen, rejected = batch.pairs
        values = dpo_sigmoid(rewards[chosen] - rewards[rejected], self.label_smoothing)
        return (Term("dpo", values, "pair", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        rewards = self._rewards(batch)
        chosen, rejected = batch.pairs
        return {
            **_margin_metrics(rewards[chosen] - rewards[rejected]),
            "reward_chosen": mean(rewards[chosen]),
            "reward_rejected": mean(rewards[rejected]),
        }

    def _rewards(self, batch: TokenBatch) -> Tensor:
        """beta h, float64 [B]."""
        assert batch.ref_logprobs is not None, "checked by Loss.evaluate"
        shift = batch.policy.double() - batch.select(batch.ref_logprobs).double().detach()
        return self.beta * batch.sum_by_sequence(batch.weight.double() * shift)


@final
@dataclass(frozen=True)
class ORPO(Loss):
    r"""Odds-ratio preference optimisation: NLL of the chosen response and ``-lambda log sigmoid`` of the log odds ratio.

    With a, b the mean log-probs of chosen and rejected and ``lo(x) = x - log(1 - e^x)``:
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

    def __post_init__(self) -> None:
        number("lam", self.lam, low=0.0, strict=False)
        number("max_prob", self.max_prob, low=0.0, high=1.0)
        if self.nll not in ("sequence_mean", "token_mean"):
            raise ConfigError(f"nll must be 'sequence_mean' or 'token_mean', got {self.nll!r}")
        object.__setattr__(self, "aggregation", _pair_aggregation(self.aggregation))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        return ("weights",)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("pair_id", "role")

    @classmethod
    def from_config(
        cls,
        *,
        lam: float = 0.1,
        nll: Literal["sequence_mean", "token_mean"] = "sequence_mean",
        max_prob: float = 1.0 - 1e-4,
        aggregation: PairAggregation = "pair_mean",
    ) -> Self:
        return cls(lam, nll, max_prob, aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        chosen, rejected = self._mean_logprobs(batch)
        odds = -logsigmoid(log_odds_ratio(chosen, rejected, self.max_prob))
        return (self._nll_term(batch, chosen), Term("odds", odds, "pair", self.main_aggregation, self.lam))

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        chosen, rejected = self._mean_logprobs(batch)
        capped = torch.cat([chosen, rejected]).exp() > self.max_prob
        return {
            **_margin_metrics(log_odds_ratio(chosen, rejected, self.max_prob)),
            "nll_chosen": mean(-chosen),
            "nll_rejected": mean(-rejected),
            "odds_capped": total(capped.sum()),
        }

    def _nll_term(self, batch: TokenBatch, chosen: Tensor) -> Term:
        if self.nll == "sequence_mean":
            return Term("nll", -chosen, "pair", self.main_aggregation)
        is_chosen = torch.zeros(batch.num_sequences, dtype=torch.bool, device=chosen.device)
        where = is_chosen.index_fill(0, batch.pairs.chosen, True)[batch.sequence_index]
        values = torch.where(where, -batch.policy, torch.zeros_like(batch.policy))
        return Term("nll", values, "token", AGGREGATIONS["token_mean"], where=where)

    def _mean_logprobs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Weighted mean log-prob of chosen and rejected, float64 [P] each."""
        _refuse_empty(batch, self.name)
        weight = batch.weight_per_sequence
        if bool((weight[torch.cat(batch.pairs)] <= 0).any()):
            raise EmptyUnitError("orpo: every response needs weights with a positive sum, to take a mean log-prob")
        means = batch.sum_by_sequence(batch.weight.double() * batch.policy.double()) / weight
        return means[batch.pairs.chosen], means[batch.pairs.rejected]


def _margin_metrics(margin: Tensor) -> dict[str, Metric]:
    """Ties count as half: at policy = reference every margin is 0, which is no failure."""
    accuracy = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {"margin": mean(margin), "accuracy": mean(accuracy)}

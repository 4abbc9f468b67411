"""DPO: direct preference optimisation against a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from torch import Tensor

from ..aggregation import Aggregation
from ..base import GradientKind, Loss, Term
from ..batch import TokenBatch
from ..checks import number
from ..functional.preference import dpo_sigmoid
from ..metrics import Metric, mean
from .pairs import PairAggregation, margin_metrics, refuse_empty

__all__ = ["DPO"]


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
    required_inputs: ClassVar[tuple[str, ...]] = ("weights", "ref_logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("pair_id", "role")

    def __post_init__(self) -> None:
        number("beta", self.beta, low=0.0)
        number("label_smoothing", self.label_smoothing, low=0.0, high=0.5, strict=False)
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "pair"))

    @classmethod
    def from_config(
        cls, *, beta: float = 0.1, label_smoothing: float = 0.0, aggregation: PairAggregation = "pair_mean"
    ) -> Self:
        return cls(beta, label_smoothing, aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        refuse_empty(batch, self.name)
        rewards = self._rewards(batch)
        chosen, rejected = batch.pairs
        values = dpo_sigmoid(rewards[chosen] - rewards[rejected], self.label_smoothing)
        return (Term("dpo", values, "pair", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        rewards = self._rewards(batch)
        chosen, rejected = batch.pairs
        return {
            **margin_metrics(rewards[chosen] - rewards[rejected]),
            "reward_chosen": mean(rewards[chosen]),
            "reward_rejected": mean(rewards[rejected]),
        }

    def _rewards(self, batch: TokenBatch) -> Tensor:
        """Return beta h of each sequence, float64 [B]."""
        log_ratio = batch.policy.double() - batch.masked("ref_logprobs").double()
        return self.beta * batch.sum_by_sequence(batch.weight.double() * log_ratio)

"""DPO: direct preference optimisation against a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, final

from ...errors import ConfigError
from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch.problems import Problem
from ..batch.token_batch import TokenBatch
from ..checks import number
from ..evaluation.metrics import DeferredMetric, mean
from ..evaluation.pair_terms import PairTerm, Responses
from ..evaluation.terms import Summand
from ..functional.preference import dpo
from ..registry import register
from .pairs import empty_responses, margin_metrics, wrong_reference_sums

__all__ = ["DPO"]

_LOG_RATIOS: Final = Responses("ref_logprobs")  # h


@register
@final
@dataclass(frozen=True)
class DPO(Loss):
    r"""Direct preference optimisation, ``-log sigmoid(beta (h_chosen - h_rejected))`` averaged over pairs.

    h = ``sum_t w_t (logprob_t - ref_logprob_t)``, summed in fp64 over each side's own weights. The gradient with respect to a
    chosen log-prob is ``-beta w sigmoid(-z) / pairs``, of a rejected one its opposite. Where policy and reference are
    equal the loss is log 2 and the slope beta / 2. A `TokenBatch` may hold ``ref_logprob_sums``, one number per sequence, in
    place of the reference's log-probs.

    Args:
        beta: strength of the tie to the reference, > 0.
        label_smoothing: rate of flipped labels, in [0, 0.5).
        aggregation: ``pair_mean`` or ``sum``.

    Raises:
        EmptyUnitError: (on use) a response has no trained token.
        InvalidDatumsError: (on use) a sum of the reference's log-probs is not finite, or positive.

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
    alternative_inputs: ClassVar[Mapping[str, str]] = MappingProxyType({"ref_logprobs": "ref_logprob_sums"})

    def __post_init__(self) -> None:
        number("beta", self.beta, low=0.0)
        number("label_smoothing", self.label_smoothing, low=0.0, high=0.5, strict=False)
        if self.label_smoothing == 0.5:
            raise ConfigError("label_smoothing must be below 0.5, where a label says nothing, got 0.5")
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "pair"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        return (PairTerm("dpo", dpo, _LOG_RATIOS, (self.beta, self.label_smoothing), self.main_aggregation),)

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        return empty_responses(batch, self.name), wrong_reference_sums(batch)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        chosen, rejected = (self.beta * log_ratio for log_ratio in _LOG_RATIOS.sides(batch))
        margins = margin_metrics(chosen - rejected)
        return {**margins, "reward_chosen": mean(chosen), "reward_rejected": mean(rejected)}

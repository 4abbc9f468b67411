"""DRO: the policy gradient with a quadratic tie to the anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch.token_batch import TokenBatch
from ..checks import number
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, TokenTerm
from ..functional.policy import dro
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register

__all__ = ["DRO"]


@register
@final
@dataclass(frozen=True)
class DRO(Loss):
    r"""Policy gradient with a quadratic tie, ``sum_t w_t [beta/2 (logprob_t - anchor_t)^2 - A_t logprob_t] / D``.

    The gradient with respect to a log-prob is ``w (beta (logprob - anchor) - A) / D``. The anchor is ``old_logprobs`` where
    given, else the sampler's ``logprobs``. ``weights`` are required: the quadratic acts where the advantage is 0 too, so that
    a prompt, whose sampler log-probs are often filled with 0, would be trained. Give soft or value-centred advantages, not
    ones divided by their deviation.

    Three losses have this name. This is the quadratic per token of the Tinker protocol and of verl. Direct Reward
    Optimization as published (arXiv:2405.19107) is a quadratic per sequence with a learned value and the reference as its
    anchor. Distributionally robust optimisation, with group weights, is none of the two.

    Args:
        beta: strength of the tie, > 0.
        aggregation: ``sum`` by default, as the protocol has it.

    Source: Tinker training API, losses: dro; after Direct Reward Optimization, arXiv:2405.19107.
    """

    beta: float = 0.05
    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "dro"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2405.19107", "Tinker training API, losses: dro")
    required_inputs: ClassVar[tuple[str, ...]] = ("weights", "advantages", "logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("old_logprobs", "group_id")

    def __post_init__(self) -> None:
        number("beta", self.beta, low=0.0)
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        arguments = (anchor(batch), batch.given("advantages"), self.beta)
        return (TokenTerm("policy", dro, arguments, self.main_aggregation),)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        return ratio_metrics(batch, None)

"""CISPO: the policy gradient with a clipped importance weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ...errors import ConfigError
from ..aggregation import Aggregation
from ..batch.token_batch import TokenBatch
from ..config import keys
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, TokenTerm
from ..functional.policy import cispo
from ..parts.clip import ClipRange
from ..parts.correction import CORRECTION_KEYS, Correction, check_correction
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register
from .corrected import CorrectedLoss

__all__ = ["CISPO"]


@register
@final
@dataclass(frozen=True)
class CISPO(CorrectedLoss):
    r"""Policy gradient with a clipped weight, ``-sum_t w_t clip(r_t) A_t logprob_t / D``; see `functional.cispo`.

    The weight is a constant, so that every token keeps a gradient, ``-w clip(r) A / D``. The anchor is ``old_logprobs`` where
    given, else the sampler's ``logprobs``.

    Peers use this name for other ranges: 0 to 5 ScaleRL, SkyRL and prime-rl; 0 to 6 NeMo-RL's recipe; 0.8 to 1.2 verl,
    NeMo-RL and SkyRL's Tinker server; 0.8 to 1.28 Fireworks; 0.9 to 1.1 TuFT; 0 to 1.2 Hatchery; 0 to 1.28 Trinity-RFT; no
    lower bound in TRL, whose upper one of 0.2 by default gives every token one weight. A lower bound of 0.8 pushes tokens
    that the policy has all but left at 0.8 times full strength, which is bias; so it is 0 here.

    Args:
        clip: range of the weight, absolute ratios; a bare number is refused, as it is a bound at some peers and an
            epsilon at others.
        aggregation: ``sum`` by default, as the protocol has it.
        correction: weight of the step from the sampler to ``old_logprobs``, which is then required; None is no weight.

    Raises:
        ConfigError: ``clip`` is no `ClipRange`.

    Source: MiniMax-M1, arXiv:2506.13585, equations 4 and 5; the default range: ScaleRL, arXiv:2510.13786.
    """

    clip: ClipRange = keys(ClipRange(0.0, 5.0), ClipRange, clip_low_threshold="low", clip_high_threshold="high")
    aggregation: Aggregation | str = "sum"
    correction: Correction | None = keys(None, Correction, switch="correction_weight", **CORRECTION_KEYS)

    name: ClassVar[str] = "cispo"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2506.13585", "Tinker training API, losses: cispo")

    def __post_init__(self) -> None:
        if not isinstance(self.clip, ClipRange):
            raise ConfigError(
                f"clip of cispo must be a ClipRange of absolute ratios, e.g. ClipRange(0, 5), got {self.clip!r}: a number "
                "alone is a bound at some trainers and an epsilon at others"
            )
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))
        check_correction(self.correction)

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        arguments = (anchor(batch), batch.given("advantages"), self.clip.low, self.clip.high)
        return (TokenTerm("policy", cispo, arguments, self.main_aggregation, factor=self.correction_factor(batch)),)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        return {**ratio_metrics(batch, self.clip), **self.correction_metrics(batch)}

"""PPO: the clipped policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..aggregation import Aggregation
from ..batch.token_batch import TokenBatch
from ..config import keys
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, TokenTerm
from ..functional.policy import ppo_clip
from ..parts.clip import ClipRange, check_dual_clip
from ..parts.correction import CORRECTION_KEYS, Correction, check_correction
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register
from .corrected import CorrectedLoss

__all__ = ["PPO"]


@register
@final
@dataclass(frozen=True)
class PPO(CorrectedLoss):
    r"""Clipped policy gradient, ``sum_t w_t max(-r_t A_t, -clip(r_t) A_t) / D``; see `functional.ppo_clip`.

    Args:
        clip: range of the ratio; a bare number is an epsilon, and two are ``ClipRange.from_epsilon(0.2, 0.28)``, DAPO's
            clip-higher.
        aggregation: ``sum`` by default, as the protocol has it.
        dual_clip: c > 1: the loss of a token with A < 0 is at most c |A|; it must lie above the range. None: no bound.
        correction: weight of the step from the sampler to ``old_logprobs``, which is then required; None is no weight.

    Source: arXiv:1707.06347, equation 7.
    """

    clip: ClipRange | float = keys(0.2, ClipRange, clip_low_threshold="low", clip_high_threshold="high")
    aggregation: Aggregation | str = "sum"
    dual_clip: float | None = None
    correction: Correction | None = keys(None, Correction, switch="correction_weight", **CORRECTION_KEYS)

    name: ClassVar[str] = "ppo"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:1707.06347", "Tinker training API, losses: ppo")

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", ClipRange.of(self.clip))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))
        check_dual_clip(self.dual_clip, self._clip)
        check_correction(self.correction)

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        arguments = (anchor(batch), batch.given("advantages"), self._clip.low, self._clip.high, self.dual_clip)
        return (TokenTerm("policy", ppo_clip, arguments, self.main_aggregation, factor=self.correction_factor(batch)),)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        return {**ratio_metrics(batch, self._clip, self.dual_clip), **self.correction_metrics(batch)}

    @property
    def _clip(self) -> ClipRange:
        return ClipRange.of(self.clip)

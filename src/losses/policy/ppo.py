"""PPO: the clipped policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch import TokenBatch
from ..config import keys
from ..functional.policy import ppo_clip
from ..metrics import Unread
from ..parts.clip import ClipRange
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register
from ..terms import Summand, TokenTerm

__all__ = ["PPO"]


@register
@final
@dataclass(frozen=True)
class PPO(Loss):
    r"""Clipped policy gradient, ``sum_t w_t max(-r_t A_t, -clip(r_t) A_t) / D``; see `functional.ppo_clip`.

    Args:
        clip: range of the ratio; a bare number is an epsilon.
        aggregation: ``sum`` by default, as the protocol has it.

    Source: arXiv:1707.06347, equation 7.
    """

    clip: ClipRange | float = keys(0.2, ClipRange, clip_low_threshold="low", clip_high_threshold="high")
    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "ppo"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:1707.06347", "Tinker training API, losses: ppo")
    required_inputs: ClassVar[tuple[str, ...]] = ("advantages", "logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights", "old_logprobs", "group_id")

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", ClipRange.of(self.clip))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        clip = ClipRange.of(self.clip)
        arguments = (anchor(batch), batch.given("advantages"), clip.low, clip.high)
        return (TokenTerm("policy", ppo_clip, arguments, self.main_aggregation),)

    def describe(self, batch: TokenBatch) -> Mapping[str, Unread]:
        return ratio_metrics(batch, ClipRange.of(self.clip))

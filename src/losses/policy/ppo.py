"""PPO: the clipped policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, final

from ..aggregation import Aggregation
from ..base import GradientKind, Loss, Term
from ..batch import TokenBatch
from ..functional.policy import clipped_surrogate
from ..metrics import Metric
from ..parts.clip import DEFAULT_CLIP, ClipRange
from ..parts.ratio import anchor_ratio, ratio_metrics

__all__ = ["PPO"]


@final
@dataclass(frozen=True)
class PPO(Loss):
    r"""Clipped policy gradient, ``sum_t w_t max(-r_t A_t, -clip(r_t) A_t) / D``; see `clipped_surrogate`.

    Args:
        clip: range of the ratio; a bare number is an epsilon.
        aggregation: ``sum`` by default, as the protocol has it.

    Source: arXiv:1707.06347, equation 7.
    """

    clip: ClipRange | float = DEFAULT_CLIP
    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "ppo"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:1707.06347", "Tinker training API, losses: ppo")
    required_inputs: ClassVar[tuple[str, ...]] = ("advantages", "logprobs")
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights", "old_logprobs", "group_id")

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", ClipRange.of(self.clip))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))

    @classmethod
    def from_config(
        cls, *, clip_low_threshold: float = 0.8, clip_high_threshold: float = 1.2, aggregation: str = "sum"
    ) -> Self:
        return cls(ClipRange(clip_low_threshold, clip_high_threshold), aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        values = clipped_surrogate(anchor_ratio(batch), batch.masked("advantages"), self.clip)
        return (Term("policy", values, "token", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        return ratio_metrics(batch, ClipRange.of(self.clip))

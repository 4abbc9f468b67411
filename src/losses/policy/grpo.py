"""GRPO: the clipped policy gradient of group advantages, with a KL to the reference."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ...errors import ConfigError
from ..aggregation import Aggregation
from ..base import GradientKind, Loss, Term
from ..batch import TokenBatch
from ..checks import choice
from ..functional.kl import KLEstimator, kl_value
from ..functional.policy import clipped_surrogate
from ..metrics import Metric, mean
from ..parts.clip import DEFAULT_CLIP, ClipRange
from ..parts.kl import KL, KLGradient
from ..parts.ratio import anchor_ratio, ratio_metrics

__all__ = ["GRPO"]


@final
@dataclass(frozen=True)
class GRPO(Loss):
    r"""Group-relative policy optimisation with a KL to the reference.

    ``sum_t w_t [max(-r_t A_t, -clip(r_t) A_t) + beta K_t] / D``. The KL is added after clipping. Advantages come with the
    datums (see `group_advantages`).

    Args:
        clip: range of the ratio; a bare number is an epsilon, None is no clipping.
        kl: the penalty, or None; with it ``ref_logprobs`` is required.
        anchor: what the ratio is taken against. ``rollout``: ``old_logprobs`` where given, else the sampler's
            ``logprobs``. ``none``: no ratio at all, the policy term is ``-A logprob`` (REINFORCE).
        aggregation: ``token_mean`` by default (over the whole step, as DAPO's code; arXiv:2503.14476).

    Raises:
        ConfigError: ``clip`` together with ``anchor="none"``, which leaves nothing to clip.

    Source: DeepSeekMath, arXiv:2402.03300, equation 3.
    """

    clip: ClipRange | float | None = DEFAULT_CLIP
    kl: KL | None = None
    anchor: Literal["rollout", "none"] = "rollout"
    aggregation: Aggregation | str = "token_mean"

    name: ClassVar[str] = "grpo"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2402.03300", "arXiv:2503.14476")

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))
        if self.clip is not None:
            object.__setattr__(self, "clip", ClipRange.of(self.clip))
        if self.kl is not None and not isinstance(self.kl, KL):
            raise ConfigError(
                f"kl must be a KL or None, got {self.kl!r}; for a coefficient of 0.04 write KL(beta=0.04)"
            )
        if self.anchor == "behaviour":  # type: ignore[comparison-overlap]  # the old spelling
            warnings.warn("anchor='behaviour' is now anchor='rollout'", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "anchor", "rollout")
        choice("anchor", self.anchor, ("rollout", "none"))
        if self.anchor == "none" and self.clip is not None:
            raise ConfigError("anchor='none' has no ratio to clip; give clip=None")

    @property
    def required_inputs(self) -> tuple[str, ...]:
        ratio = ("logprobs",) if self.anchor == "rollout" else ()
        reference = ("ref_logprobs",) if self.kl is not None else ()
        return ("weights", "advantages", *ratio, *reference)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("old_logprobs", "group_id") if self.anchor == "rollout" else ("group_id",)

    @classmethod
    def from_config(
        cls,
        *,
        clip_low_threshold: float = 0.8,
        clip_high_threshold: float = 1.2,
        kl_beta: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_gradient: KLGradient = "reverse",
        aggregation: str = "token_mean",
    ) -> Self:
        if not kl_beta and (kl_estimator, kl_gradient) != ("k3", "reverse"):
            raise ConfigError(
                f"kl_estimator={kl_estimator!r} and kl_gradient={kl_gradient!r} have no effect without kl_beta; give it, or "
                "drop them"
            )
        kl = KL(kl_estimator, kl_beta, kl_gradient) if kl_beta else None
        return cls(ClipRange(clip_low_threshold, clip_high_threshold), kl, "rollout", aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        advantages = batch.masked("advantages")
        ratio = self._ratio(batch)
        unanchored = self.anchor == "none"
        values = -batch.policy * advantages if unanchored else clipped_surrogate(ratio, advantages, self.clip)
        policy = Term("policy", values, "token", self.main_aggregation)
        if self.kl is None:
            return (policy,)
        penalty = self.kl.penalty(batch.policy, batch.masked("ref_logprobs"), ratio)
        return (policy, Term("kl", penalty, "token", self.main_aggregation, self.kl.beta))

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        metrics: dict[str, Metric] = {}
        if self.anchor == "rollout":
            metrics |= ratio_metrics(batch, None if self.clip is None else ClipRange.of(self.clip))
        if self.kl is not None:
            log_ratio = batch.policy - batch.masked("ref_logprobs")
            metrics["kl_ref"] = mean(kl_value(self.kl.estimator, log_ratio), batch.trained)
        return metrics

    def _ratio(self, batch: TokenBatch) -> Tensor:
        return torch.ones_like(batch.policy) if self.anchor == "none" else anchor_ratio(batch)

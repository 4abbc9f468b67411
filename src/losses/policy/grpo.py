"""GRPO: the clipped policy gradient of group advantages, with a KL to the reference."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from ...errors import ConfigError
from ..aggregation import Aggregation
from ..base import GradientKind, Loss
from ..batch import TokenBatch
from ..checks import choice
from ..config import keys
from ..functional.policy import importance_sampling, policy_gradient, ppo_clip
from ..metrics import Unread
from ..parts.clip import ClipRange
from ..parts.kl import KL
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register
from ..terms import Summand, TokenTerm

__all__ = ["GRPO"]


@register
@final
@dataclass(frozen=True)
class GRPO(Loss):
    r"""Group-relative policy optimisation with a KL to the reference.

    ``sum_t w_t [max(-r_t A_t, -clip(r_t) A_t) + beta K_t] / D``. The KL is added after clipping. Advantages come with the
    datums (see `group_advantages`).

    Args:
        clip: range of the ratio; a bare number is an epsilon, None is no clipping.
        kl: the penalty; a bare number is the beta of the default `KL`, None is no penalty. With it ``ref_logprobs`` is
            required.
        anchor: what the ratio is taken against. ``rollout``: ``old_logprobs`` where given, else the sampler's
            ``logprobs``. ``none``: no ratio at all, the policy term is ``-A logprob`` (REINFORCE).
        aggregation: ``token_mean`` by default (over the whole step, as DAPO's code; arXiv:2503.14476).

    Raises:
        ConfigError: ``clip`` together with ``anchor="none"``, which leaves nothing to clip.

    Source: DeepSeekMath, arXiv:2402.03300, equation 3.
    """

    clip: ClipRange | float | None = keys(0.2, ClipRange, clip_low_threshold="low", clip_high_threshold="high")
    kl: KL | float | None = keys(
        None, KL, switch="kl_beta", kl_beta="beta", kl_estimator="estimator", kl_gradient="gradient"
    )
    anchor: Literal["rollout", "none"] = "rollout"
    aggregation: Aggregation | str = "token_mean"

    name: ClassVar[str] = "grpo"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2402.03300", "arXiv:2503.14476")

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "token"))
        object.__setattr__(self, "clip", None if self.clip is None else ClipRange.of(self.clip))
        object.__setattr__(self, "kl", None if self.kl is None else KL.of(self.kl))
        if self.anchor == "behaviour":  # type: ignore[comparison-overlap]  # the old spelling
            warnings.warn("anchor='behaviour' is now anchor='rollout'", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "anchor", "rollout")
        choice("anchor", self.anchor, ("rollout", "none"))
        if self.anchor == "none" and self.clip is not None:
            raise ConfigError("anchor='none' has no ratio to clip; give clip=None")

    @property
    def required_inputs(self) -> tuple[str, ...]:
        ratio = ("logprobs",) if self.anchor == "rollout" else ()
        reference = self._kl.inputs if self._kl is not None else ()
        return ("weights", "advantages", *dict.fromkeys((*ratio, *reference)))

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("old_logprobs", "group_id") if self.anchor == "rollout" else ("group_id",)

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        penalty = () if self._kl is None else (self._kl.term(batch, self.main_aggregation),)
        return (self._policy(batch), *penalty)

    def describe(self, batch: TokenBatch) -> Mapping[str, Unread]:
        ratio = ratio_metrics(batch, self._clip) if self.anchor == "rollout" else {}
        return ratio if self._kl is None else {**ratio, "kl_ref": self._kl.metric(batch)}

    def _policy(self, batch: TokenBatch) -> TokenTerm:
        advantages = batch.given("advantages")
        if self.anchor == "none":
            return TokenTerm("policy", policy_gradient, (advantages,), self.main_aggregation)
        if self._clip is None:
            return TokenTerm("policy", importance_sampling, (anchor(batch), advantages), self.main_aggregation)
        arguments = (anchor(batch), advantages, self._clip.low, self._clip.high)
        return TokenTerm("policy", ppo_clip, arguments, self.main_aggregation)

    @property
    def _clip(self) -> ClipRange | None:
        return None if self.clip is None else ClipRange.of(self.clip)

    @property
    def _kl(self) -> KL | None:
        return None if self.kl is None else KL.of(self.kl)

"""GRPO: the clipped policy gradient of group advantages, with a KL to the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from ...errors import ConfigError
from ..aggregation import Aggregation
from ..batch.token_batch import TokenBatch
from ..checks import choice
from ..config import keys
from ..evaluation.metrics import DeferredMetric
from ..evaluation.terms import Summand, TokenTerm
from ..functional.policy import importance_sampling, policy_gradient, ppo_clip
from ..parts.clip import ClipRange, check_dual_clip
from ..parts.correction import CORRECTION_KEYS, Correction, check_correction
from ..parts.kl import KL
from ..parts.ratio import anchor, ratio_metrics
from ..registry import register
from .corrected import CorrectedLoss

__all__ = ["GRPO"]


@register
@final
@dataclass(frozen=True)
class GRPO(CorrectedLoss):
    r"""Group-relative policy optimisation with a KL to the reference.

    ``sum_t w_t [max(-r_t A_t, -clip(r_t) A_t) + beta K_t] / D``. The KL is added after clipping. Advantages come with the
    datums (see `group_advantages`).

    Args:
        clip: range of the ratio; a bare number is an epsilon, two are ``ClipRange.from_epsilon(0.2, 0.28)`` (DAPO's
            clip-higher), None is no clipping.
        kl: the penalty; a bare number is the beta of the default `KL`, None is no penalty. With it ``ref_logprobs`` is
            required.
        anchor: what the ratio is taken against. ``rollout``: ``old_logprobs`` where given, else the sampler's
            ``logprobs``. ``none``: no ratio at all, the policy term is ``-A logprob`` (REINFORCE).
        aggregation: ``token_mean`` by default (over the whole step, as DAPO's code; arXiv:2503.14476).
        dual_clip: c > 1: the loss of a token with A < 0 is at most c |A|; it must lie above the range. None: no bound.
        correction: weight of the step from the sampler to ``old_logprobs``, which is then required; None is no weight. The
            KL is not weighted by it.

    Raises:
        ConfigError: ``clip`` together with ``anchor="none"``, which leaves nothing to clip, or ``dual_clip`` without
            ``clip``.

    Source: DeepSeekMath, arXiv:2402.03300, equation 3.
    """

    clip: ClipRange | float | None = keys(0.2, ClipRange, clip_low_threshold="low", clip_high_threshold="high")
    kl: KL | float | None = keys(
        None, KL, switch="kl_beta", kl_beta="beta", kl_estimator="estimator", kl_gradient="gradient"
    )
    anchor: Literal["rollout", "none"] = "rollout"
    aggregation: Aggregation | str = "token_mean"
    dual_clip: float | None = None
    correction: Correction | None = keys(None, Correction, switch="correction_weight", **CORRECTION_KEYS)

    name: ClassVar[str] = "grpo"
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
        check_dual_clip(self.dual_clip, self._clip)
        check_correction(self.correction)

    @property
    def required_inputs(self) -> tuple[str, ...]:
        ratio = ("logprobs",) if self.anchor == "rollout" else ()
        reference = self._kl.inputs if self._kl is not None else ()
        sampler = self.correction.inputs if self.correction is not None else ()
        return ("weights", "advantages", *dict.fromkeys((*ratio, *sampler, *reference)))

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        anchored = self.anchor == "rollout" or (self._kl is not None and self._kl.importance == "anchor")
        return ("old_logprobs", "group_id") if anchored and self.correction is None else ("group_id",)

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        penalty = () if self._kl is None else (self._kl.term(batch, self.main_aggregation),)
        return (self._policy(batch), *penalty)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        ratio = ratio_metrics(batch, self._clip, self.dual_clip) if self.anchor == "rollout" else {}
        metrics = {**ratio, **self.correction_metrics(batch)}
        return metrics if self._kl is None else {**metrics, "kl_ref": self._kl.metric(batch)}

    def _policy(self, batch: TokenBatch) -> TokenTerm:
        definition, arguments = self._definition(batch)
        return TokenTerm("policy", definition, arguments, self.main_aggregation, factor=self.correction_factor(batch))

    def _definition(self, batch: TokenBatch) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        advantages = batch.given("advantages")
        if self.anchor == "none":
            return policy_gradient, (advantages,)
        if self._clip is None:
            return importance_sampling, (anchor(batch), advantages)
        return ppo_clip, (anchor(batch), advantages, self._clip.low, self._clip.high, self.dual_clip)

    @property
    def _clip(self) -> ClipRange | None:
        return None if self.clip is None else ClipRange.of(self.clip)

    @property
    def _kl(self) -> KL | None:
        return None if self.kl is None else KL.of(self.kl)

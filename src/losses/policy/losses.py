"""Policy-gradient losses on sampled tokens: importance sampling, PPO, GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ...errors import ConfigError
from ..aggregation import Aggregation
from ..base import GradientKind, Loss, Term
from ..batch import TokenBatch
from ..kl import KL, KLEstimator, KLGradient, kl_value
from ..metrics import Metric, mean
from ..ratio import DEFAULT_BAND, RatioBand, anchor_ratio, clipped_surrogate, given, ratio_metrics

__all__ = ["GRPO", "PPO", "ImportanceSampling"]


@final
@dataclass(frozen=True)
class ImportanceSampling(Loss):
    r"""Importance-weighted policy gradient, ``-sum_t w_t r_t A_t / D`` with ``r = exp(logprob - anchor)``.

    The gradient with respect to a log-prob is ``-w r A / D``. The anchor is ``old_logprobs`` where given, else the
    sampler's ``logprobs``. Log-ratios above 20 continue by the tangent of exp (counted in ``ratio_saturated``).

    Args:
        aggregation: ``sum`` by default, as the protocol has it.
    """

    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "importance_sampling"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("Tinker training API, losses: importance_sampling",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        return ("advantages", "logprobs")

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("weights", "old_logprobs", "group_id")

    @classmethod
    def from_config(cls, *, aggregation: str = "sum") -> Self:
        return cls(aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        ratio = anchor_ratio(batch)
        values = clipped_surrogate(ratio, batch.select(given(batch.advantages)), None)
        return (Term("policy", values, "token", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        return ratio_metrics(batch, anchor_ratio(batch), None)


@final
@dataclass(frozen=True)
class PPO(Loss):
    r"""Clipped policy gradient, ``sum_t w_t max(-r_t A_t, -clip(r_t) A_t) / D``; see `clipped_surrogate`.

    Args:
        clip: absolute band of the ratio.
        aggregation: ``sum`` by default, as the protocol has it.

    Source: arXiv:1707.06347, equation 7.
    """

    clip: RatioBand = DEFAULT_BAND
    aggregation: Aggregation | str = "sum"

    name: ClassVar[str] = "ppo"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:1707.06347", "Tinker training API, losses: ppo")

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        return ("advantages", "logprobs")

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("weights", "old_logprobs", "group_id")

    @classmethod
    def from_config(
        cls, *, clip_low_threshold: float = 0.8, clip_high_threshold: float = 1.2, aggregation: str = "sum"
    ) -> Self:
        return cls(RatioBand(clip_low_threshold, clip_high_threshold), aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        ratio = anchor_ratio(batch)
        values = clipped_surrogate(ratio, batch.select(given(batch.advantages)), self.clip)
        return (Term("policy", values, "token", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        return ratio_metrics(batch, anchor_ratio(batch), self.clip)


@final
@dataclass(frozen=True)
class GRPO(Loss):
    r"""Group-relative policy optimisation with a KL to the reference.

    ``sum_t w_t [max(-r_t A_t, -clip(r_t) A_t) + beta K_t] / D``. The KL is added after clipping. Advantages come with the
    datums (see `group_advantages`).

    Args:
        clip: absolute band of the ratio, or None for no clipping.
        kl: the penalty, or None; with it ``ref_logprobs`` is required.
        anchor: what the ratio is taken against. ``behaviour``: ``old_logprobs`` where given, else the sampler's
            ``logprobs``. ``none``: no ratio at all, the policy term is ``-A logprob`` (REINFORCE).
        aggregation: ``token_mean`` by default (over the whole step, as DAPO's code; arXiv:2503.14476).

    Raises:
        ConfigError: ``clip`` together with ``anchor="none"``, which leaves nothing to clip.

    Source: DeepSeekMath, arXiv:2402.03300, equation 3.
    """

    clip: RatioBand | None = DEFAULT_BAND
    kl: KL | None = None
    anchor: Literal["behaviour", "none"] = "behaviour"
    aggregation: Aggregation | str = "token_mean"

    name: ClassVar[str] = "grpo"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2402.03300", "arXiv:2503.14476")

    def __post_init__(self) -> None:
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation))
        if self.anchor not in ("behaviour", "none"):
            raise ConfigError(f"anchor must be 'behaviour' or 'none', got {self.anchor!r}")
        if self.anchor == "none" and self.clip is not None:
            raise ConfigError("anchor='none' has no ratio to clip; give clip=None")

    @property
    def required_inputs(self) -> tuple[str, ...]:
        ratio = ("logprobs",) if self.anchor == "behaviour" else ()
        reference = ("ref_logprobs",) if self.kl is not None else ()
        return ("weights", "advantages", *ratio, *reference)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("old_logprobs", "group_id") if self.anchor == "behaviour" else ("group_id",)

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
        return cls(RatioBand(clip_low_threshold, clip_high_threshold), kl, "behaviour", aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        advantages = batch.select(given(batch.advantages))
        ratio = self._ratio(batch)
        if self.anchor == "none":
            values = -batch.policy * advantages.detach()
        else:
            values = clipped_surrogate(ratio, advantages, self.clip)
        policy = Term("policy", values, "token", self.main_aggregation)
        if self.kl is None:
            return (policy,)
        penalty = self.kl.penalty(batch.policy, batch.select(given(batch.ref_logprobs)), ratio)
        return (policy, Term("kl", penalty, "token", self.main_aggregation, self.kl.beta))

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        found: dict[str, Metric] = {}
        if self.anchor == "behaviour":
            found |= ratio_metrics(batch, self._ratio(batch), self.clip)
        if self.kl is not None:
            log_ratio = batch.policy - batch.select(given(batch.ref_logprobs))
            found["kl_ref"] = mean(kl_value(self.kl.estimator, log_ratio), batch.trained)
        return found

    def _ratio(self, batch: TokenBatch) -> Tensor:
        if self.anchor == "none":
            return torch.ones_like(batch.policy)
        return anchor_ratio(batch)

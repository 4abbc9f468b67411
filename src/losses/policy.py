"""Policy-gradient losses on sampled tokens: importance sampling, PPO, GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor

from ..errors import ConfigError, MissingFieldError
from .aggregation import Aggregation
from .base import GradientKind, Loss, Normalization, Term, number
from .batch import TokenBatch
from .kl import KL, KLEstimator, KLGradient, kl_value
from .metrics import Metric, maximum, mean, total
from .numerics import EXPONENT_LIMIT, bounded_exp

__all__ = ["GRPO", "PPO", "ImportanceSampling", "RatioBand", "clipped_surrogate"]


@final
@dataclass(frozen=True)
class RatioBand:
    """A clip band of absolute probability ratios, ``low <= ratio <= high``.

    Raises:
        ConfigError: not 0 <= low <= 1 <= high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        number("clip band low", self.low, low=0.0, high=1.0, strict=False)
        if not (isinstance(self.high, (int, float)) and self.high >= 1.0):
            raise ConfigError(
                f"a clip band is in absolute ratios and must contain 1, got high={self.high!r}; for an offset of "
                "0.2 write RatioBand.from_offsets(0.2, 0.2)"
            )

    @classmethod
    def from_offsets(cls, low: float, high: float) -> RatioBand:
        """The band (1 - low, 1 + high): PPO's epsilons."""
        return cls(1.0 - low, 1.0 + high)

    @classmethod
    def from_log(cls, low: float, high: float) -> RatioBand:
        """The band (exp(-low), exp(high)), for bounds on the log-ratio."""
        bounds = torch.tensor([-low, high], dtype=torch.float64).exp().tolist()
        return cls(bounds[0], bounds[1])

    def clips(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """True where the clipped branch is the larger loss; strictly outside the band only."""
        return ((advantages > 0) & (ratio > self.high)) | ((advantages < 0) & (ratio < self.low))


def clipped_surrogate(ratio: Tensor, advantages: Tensor, band: RatioBand | None) -> Tensor:
    r"""Per-token policy loss, ``max(-r A, -clip(r, low, high) A)``; without a band ``-r A``.

    The gradient with respect to the log-prob is ``-r A`` inside the band and on its edge, and 0 where clipped.

    Args:
        ratio: policy / anchor, differentiable, any shape.
        advantages: the same shape; detached here.
        band: absolute bounds, or None.

    Source: PPO, arXiv:1707.06347, equation 7; asymmetric bounds: DAPO, arXiv:2503.14476, equation 10.
    """
    advantages = advantages.detach()
    plain = -ratio * advantages
    if band is None:
        return plain
    clipped = -ratio.detach().clamp(band.low, band.high) * advantages
    return torch.where(band.clips(ratio, advantages), clipped, plain)


def _anchor(batch: TokenBatch) -> Tensor:
    anchor = batch.old_logprobs if batch.old_logprobs is not None else batch.behaviour_logprobs
    if anchor is None:
        raise MissingFieldError("missing required field 'logprobs': the ratio needs the log-probs of the sampler")
    return anchor


def _ratio(logprobs: Tensor, anchor: Tensor) -> Tensor:
    return bounded_exp(logprobs - anchor.detach())


def _policy_metrics(batch: TokenBatch, ratio: Tensor, band: RatioBand | None) -> dict[str, Metric]:
    """Ratio, clipping and signal over the trained tokens. ESS / N is ``ratio^2 / ratio_squared``."""
    trained, advantages = batch.trained, batch.select(_given(batch.advantages))
    log_ratio = batch.policy - batch.select(_anchor(batch))
    found = {
        "ratio": mean(ratio, trained),
        "ratio_largest": maximum(ratio, trained),
        "ratio_squared": mean(ratio.double().square(), trained),
        "ratio_saturated": total((log_ratio > EXPONENT_LIMIT)[trained].sum()),
        "kl_anchor": mean(kl_value("k3", log_ratio), trained),
        "advantage": mean(advantages, trained),
        "advantage_abs": mean(advantages.abs(), trained),
    }
    if band is not None:
        found["clip_fraction"] = mean(band.clips(ratio, advantages).double(), trained)
    return found


def _given(value: Tensor | None) -> Tensor:
    assert value is not None, "checked by Loss.evaluate"
    return value


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

    @property
    def main_aggregation(self) -> Aggregation:
        return Aggregation.of(self.aggregation)

    @property
    def normalization(self) -> Normalization | None:
        return None if self.main_aggregation.is_mean else "num_loss_tokens"

    @classmethod
    def from_config(cls, *, aggregation: str = "sum") -> Self:
        return cls(aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        ratio = _ratio(batch.policy, batch.select(_anchor(batch)))
        values = clipped_surrogate(ratio, batch.select(_given(batch.advantages)), None)
        return (Term("policy", values, "token", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        return _policy_metrics(batch, _ratio(batch.policy, batch.select(_anchor(batch))), None)


@final
@dataclass(frozen=True)
class PPO(Loss):
    r"""Clipped policy gradient, ``sum_t w_t max(-r_t A_t, -clip(r_t) A_t) / D``; see `clipped_surrogate`.

    Args:
        clip: absolute band of the ratio.
        aggregation: ``sum`` by default, as the protocol has it.

    Source: arXiv:1707.06347, equation 7.
    """

    clip: RatioBand = RatioBand(0.8, 1.2)
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

    @property
    def main_aggregation(self) -> Aggregation:
        return Aggregation.of(self.aggregation)

    @property
    def normalization(self) -> Normalization | None:
        return None if self.main_aggregation.is_mean else "num_loss_tokens"

    @classmethod
    def from_config(
        cls, *, clip_low_threshold: float = 0.8, clip_high_threshold: float = 1.2, aggregation: str = "sum"
    ) -> Self:
        return cls(RatioBand(clip_low_threshold, clip_high_threshold), aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        ratio = _ratio(batch.policy, batch.select(_anchor(batch)))
        values = clipped_surrogate(ratio, batch.select(_given(batch.advantages)), self.clip)
        return (Term("policy", values, "token", self.main_aggregation),)

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        return _policy_metrics(batch, _ratio(batch.policy, batch.select(_anchor(batch))), self.clip)


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

    clip: RatioBand | None = RatioBand(0.8, 1.2)
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

    @property
    def main_aggregation(self) -> Aggregation:
        return Aggregation.of(self.aggregation)

    @property
    def normalization(self) -> Normalization | None:
        return None if self.main_aggregation.is_mean else "num_loss_tokens"

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
        kl = KL(kl_estimator, kl_beta, kl_gradient) if kl_beta else None
        return cls(RatioBand(clip_low_threshold, clip_high_threshold), kl, "behaviour", aggregation)

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        advantages = batch.select(_given(batch.advantages))
        ratio = self._ratio(batch)
        if self.anchor == "none":
            values = -batch.policy * advantages.detach()
        else:
            values = clipped_surrogate(ratio, advantages, self.clip)
        policy = Term("policy", values, "token", self.main_aggregation)
        if self.kl is None:
            return (policy,)
        penalty = self.kl.penalty(batch.policy, batch.select(_given(batch.ref_logprobs)), ratio)
        return (policy, Term("kl", penalty, "token", self.main_aggregation, self.kl.beta))

    def describe(self, batch: TokenBatch, terms: tuple[Term, ...]) -> Mapping[str, Metric]:
        found: dict[str, Metric] = {}
        if self.anchor == "behaviour":
            found |= _policy_metrics(batch, self._ratio(batch), self.clip)
        if self.kl is not None:
            log_ratio = batch.policy - batch.select(_given(batch.ref_logprobs))
            found["kl_ref"] = mean(kl_value(self.kl.estimator, log_ratio), batch.trained)
        return found

    def _ratio(self, batch: TokenBatch) -> Tensor:
        if self.anchor == "none":
            return torch.ones_like(batch.policy)
        return _ratio(batch.policy, batch.select(_anchor(batch)))

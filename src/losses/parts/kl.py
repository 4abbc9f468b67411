"""KL penalty to a frozen reference: the value estimator and the gradient mode are separate choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from torch import Tensor

from ...errors import BiasedGradientError, ConfigError
from ..aggregation import Aggregation
from ..batch.selection import select_, wide
from ..batch.token_batch import TokenBatch
from ..checks import choice, number
from ..evaluation.metrics import DeferredMetric, mean
from ..evaluation.terms import TokenTerm
from ..functional.kl import KLEstimator, KLGradient, kl, kl_penalty
from .ratio import anchor, importance_ratio

__all__ = ["KL", "KLGradient"]

_BIASED: Final = {
    "k1": "its expected gradient is exactly zero: the reference has no influence at all",
    "abs": "its gradient is that of neither direction of the KL",
}


@final
@dataclass(frozen=True)
class KL:
    """A KL penalty ``beta * w * K`` with K from `functional.kl` and w the detached ratio of policy to sampler.

    Args:
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``: the value that is reported.
        beta: coefficient, >= 0.
        gradient: ``reverse``: dK/dlogprob = D, with ``importance`` the unbiased gradient of the reverse KL
            (policy || reference), whatever estimator is reported. ``pathwise``: the estimator's own derivative
            (k2: D, biased off-policy; k3: 1 - exp(-D), the gradient of the *forward* KL; k1: 1). ``none``: report only.
        importance: weigh by the detached ratio policy / sampler, so that stale samples stay unbiased; needs the sampler's
            ``logprobs``, also where ``old_logprobs`` are the anchor of the clipped ratio. ``anchor``: by the ratio to that
            anchor, which is biased where it is not the sampler.
        acknowledge_biased: allow a combination that is known to be wrong (k1 or abs with ``pathwise``, importance by the
            anchor).

    Raises:
        BiasedGradientError: a combination that is known to be wrong, and no acknowledgement.
        ConfigError: a field is out of range.
    """

    estimator: KLEstimator = "k3"
    beta: float = 0.04
    gradient: KLGradient = "reverse"
    importance: bool | Literal["anchor"] = True
    acknowledge_biased: bool = False

    def __post_init__(self) -> None:
        choice("KL estimator", self.estimator, get_args(KLEstimator))
        choice("KL gradient", self.gradient, get_args(KLGradient))
        if not isinstance(self.importance, bool) and self.importance != "anchor":
            raise ConfigError(f"KL importance must be True, False or 'anchor', got {self.importance!r}")
        number("KL beta", self.beta, low=0.0, strict=False)
        if not isinstance(self.acknowledge_biased, bool):
            raise ConfigError(f"acknowledge_biased of KL must be True or False, got {self.acknowledge_biased!r}")
        if self.gradient == "pathwise" and self.estimator in _BIASED and not self.acknowledge_biased:
            raise BiasedGradientError(
                f"KL({self.estimator!r}, gradient='pathwise') is not a KL penalty: {_BIASED[self.estimator]}. Use "
                "gradient='reverse' (unbiased), or acknowledge_biased=True to reproduce a published script"
            )

        if self.importance == "anchor" and not self.acknowledge_biased:
            raise BiasedGradientError(
                "KL(importance='anchor') is unbiased only where old_logprobs are the sampler's own. Use importance=True, or "
                "acknowledge_biased=True to reproduce a published script"
            )

    @classmethod
    def of(cls, value: KL | float) -> KL:
        """Return ``value`` as a penalty; a bare number is the beta of the default one.

        Raises:
            ConfigError: it is neither.
        """
        if isinstance(value, KL):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"kl must be a KL, its beta or None, got {value!r}")
        return cls(beta=value)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Datum keys that the penalty needs."""
        return ("ref_logprobs", "logprobs") if self.importance else ("ref_logprobs",)

    def term(self, batch: TokenBatch, aggregation: Aggregation) -> TokenTerm:
        """Return the penalty as a summand of a loss."""
        return TokenTerm(
            "kl",
            kl_penalty,
            (batch.given("ref_logprobs"), self.estimator, self.gradient),
            aggregation,
            self.beta,
            self._weight(batch),
        )

    def _weight(self, batch: TokenBatch) -> Tensor | None:
        if not self.importance:
            return None
        return importance_ratio(
            batch, anchor(batch) if self.importance == "anchor" else batch.given("rollout_logprobs")
        )

    def metric(self, batch: TokenBatch) -> DeferredMetric:
        """Return the mean of the estimator over the trained tokens, without importance weights."""
        log_ratio = select_(wide(batch.logprobs.detach()) - batch.given("ref_logprobs"), batch.mask)
        return mean(kl(log_ratio, 0.0, self.estimator), batch.trained_count)

    def penalty(self, logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor) -> Tensor:
        """Return w * K per token, shape of ``logprobs``; beta is the term's scale.

        Args:
            logprobs: current policy, fp32 or better.
            ref_logprobs: the reference; detached here.
            ratio: policy / sampler; detached here, ignored without ``importance``.
        """
        values = kl_penalty(logprobs, ref_logprobs, self.estimator, self.gradient)
        return ratio.detach() * values if self.importance else values

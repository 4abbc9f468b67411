"""KL to a frozen reference, estimated on sampled tokens: value estimator and gradient mode are separate choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from ..errors import BiasedGradientError, ConfigError, suggestion
from .numerics import bounded_expm1

__all__ = ["KL", "KLEstimator", "KLGradient", "kl_value"]

KLEstimator = Literal["k1", "k2", "k3", "abs"]
KLGradient = Literal["reverse", "pathwise", "none"]
_ESTIMATORS: Final = ("k1", "k2", "k3", "abs")
_GRADIENTS: Final = ("reverse", "pathwise", "none")
_BIASED: Final = {
    "k1": "its expected gradient is exactly zero: the reference has no influence at all",
    "abs": "its gradient is that of neither direction of the KL",
}


def kl_value(estimator: KLEstimator, log_ratio: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from ``log_ratio = logprob - ref_logprob`` = D.

    ``k1 = D``, ``k2 = D^2 / 2``, ``k3 = exp(-D) - 1 + D``, ``abs = |D|``. Source: J. Schulman, "Approximating KL
    divergence", 2020. k3 uses expm1 (no cancellation near 0) and a tangent beyond exp(20) instead of a clamp, which
    would switch the penalty off where it is needed most.
    """
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return 0.5 * log_ratio.square()
        case "k3":
            return bounded_expm1(-log_ratio) + log_ratio
        case "abs":
            return log_ratio.abs()


@final
@dataclass(frozen=True)
class KL:
    """A KL penalty ``beta * w * K`` with K from `kl_value` and w the detached importance ratio.

    Args:
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``: the value that is reported.
        beta: coefficient, >= 0.
        gradient: ``reverse``: dK/dlogprob = D, with ``importance`` the unbiased gradient of the reverse KL
            (policy || reference), whatever estimator is reported. ``pathwise``: the estimator's own derivative
            (k2: D, biased off-policy; k3: 1 - exp(-D), the gradient of the *forward* KL; k1: 1). ``none``: report only.
        importance: weigh by the detached ratio policy / behaviour, so that stale samples stay unbiased.
        acknowledge_biased: allow a combination that is known to be wrong (k1 or abs with ``pathwise``).

    Raises:
        BiasedGradientError: k1 or abs with ``pathwise`` and no acknowledgement.
        ConfigError: a field is out of range.
    """

    estimator: KLEstimator = "k3"
    beta: float = 0.04
    gradient: KLGradient = "reverse"
    importance: bool = True
    acknowledge_biased: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.estimator, _ESTIMATORS),
            ("gradient", self.gradient, _GRADIENTS),
        ):
            if value not in known:
                raise ConfigError(
                    f"KL {name} must be one of {', '.join(known)}, got {value!r}{suggestion(str(value), known)}"
                )
        if not 0.0 <= self.beta < float("inf"):
            raise ConfigError(f"KL beta must be finite and at least 0, got {self.beta!r}")
        if self.gradient == "pathwise" and self.estimator in _BIASED and not self.acknowledge_biased:
            raise BiasedGradientError(
                f"KL({self.estimator!r}, gradient='pathwise') is not a KL penalty: {_BIASED[self.estimator]}. Use "
                "gradient='reverse' (unbiased), or acknowledge_biased=True to reproduce a published script"
            )

    def penalty(self, logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor) -> Tensor:
        """Return w * K per token, shape of ``logprobs``; beta is the term's scale.

        Args:
            logprobs: current policy, fp32 or better.
            ref_logprobs: the reference; detached here.
            ratio: policy / behaviour; detached here, ignored without ``importance``.
        """
        log_ratio = logprobs - ref_logprobs.detach()
        weight = ratio.detach() if self.importance else torch.ones_like(log_ratio)
        match self.gradient:
            case "pathwise":
                return weight * kl_value(self.estimator, log_ratio)
            case "none":
                return weight * kl_value(self.estimator, log_ratio).detach()
            case "reverse":
                value = kl_value(self.estimator, log_ratio).detach()
                slope = log_ratio.detach()
                return weight * (value + slope * (logprobs - logprobs.detach()))

"""KL divergence from the policy to a reference, estimated on sampled tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .numerics import bounded_expm1

__all__ = ["KLEstimator", "kl_value"]

KLEstimator = Literal["k1", "k2", "k3", "abs"]


def kl_value(estimator: KLEstimator, log_ratio: Tensor) -> Tensor:
    """Return the estimate of KL(policy || reference) at each token, from ``D = logprob - ref_logprob``.

    ``k1 = D``, ``k2 = D^2 / 2``, ``k3 = exp(-D) - 1 + D``, ``abs = |D|``. k3 uses expm1 (no cancellation near 0) and a
    tangent beyond exp(20) instead of a clamp, which would switch the penalty off where it is needed most.

    Args:
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``.
        log_ratio: D, nats; any shape.

    Returns:
        One value per token, shape of ``log_ratio``.

    Source: J. Schulman, "Approximating KL divergence", 2020.
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

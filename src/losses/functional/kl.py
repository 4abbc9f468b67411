"""KL divergence from the policy to a reference, estimated on sampled tokens."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor

from .closed_form import closed_form
from .numerics import EXPONENT_LIMIT, bounded_expm1, constant, surely_above

__all__ = ["KLEstimator", "KLGradient", "kl", "kl_penalty"]

KLEstimator = Literal["k1", "k2", "k3", "abs"]
KLGradient = Literal["reverse", "pathwise", "none"]
_PEAK: Final = math.exp(EXPONENT_LIMIT)


def kl(logprobs: Tensor, ref_logprobs: Tensor | float, estimator: KLEstimator = "k3") -> Tensor:
    """Return the estimate of KL(policy || reference) at each token, from ``D = logprob - ref_logprob``.

    ``k1 = D``, ``k2 = D^2 / 2``, ``k3 = exp(-D) - 1 + D``, ``abs = |D|``. k3 uses expm1 (no cancellation near 0) and a
    tangent beyond exp(20) instead of a clamp, which would switch the penalty off where it is needed most. The derivatives
    with respect to the log-prob are 1, D, ``1 - exp(-D)`` and the sign of D.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        ref_logprobs: those of the reference, a constant; broadcasts to ``logprobs``, or 0.0 where these are D already.
        estimator: ``k1``, ``k2``, ``k3`` or ``abs``.

    Returns:
        One value per token, shape of ``logprobs``.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = logprobs - constant(ref_logprobs)
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return 0.5 * log_ratio.square()
        case "k3":
            return bounded_expm1(-log_ratio) + log_ratio
        case "abs":
            return log_ratio.abs()


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor | float,
    estimator: KLEstimator = "k3",
    gradient: KLGradient = "reverse",
) -> Tensor:
    """Return the value of `kl` at each token, with the gradient of ``gradient``.

    ``reverse``: the derivative with respect to the log-prob is D whatever the estimator, which times the importance weight
    is the unbiased gradient of the reverse KL (policy || reference). ``pathwise``: the estimator's own derivative.
    ``none``: 0.

    Args:
        logprobs: log-probs of the sampled tokens, nats; any shape.
        ref_logprobs: those of the reference, a constant; broadcasts to ``logprobs``, or 0.0 where these are D already.
        estimator: the value, ``k1``, ``k2``, ``k3`` or ``abs``.
        gradient: ``reverse``, ``pathwise`` or ``none``.

    Returns:
        One value per token, shape of ``logprobs``.
    """
    value = kl(logprobs, ref_logprobs, estimator)
    match gradient:
        case "pathwise":
            return value
        case "none":
            return value.detach()
        case "reverse":
            log_ratio = logprobs.detach() - constant(ref_logprobs)
            return value.detach() + log_ratio * (logprobs - logprobs.detach())


@closed_form(kl)
def _kl(x: Tensor, ref_logprobs: Tensor | float, estimator: KLEstimator = "k3") -> tuple[Tensor, Tensor]:
    log_ratio = x - ref_logprobs
    match estimator:
        case "k1":
            return log_ratio, torch.ones_like(log_ratio)
        case "k2":
            return log_ratio.square().mul_(0.5), log_ratio
        case "k3":
            value, minus_slope = _k3(log_ratio)
            return value, minus_slope.neg_()
        case "abs":
            return log_ratio.abs(), log_ratio.sign_()


@closed_form(kl_penalty)
def _kl_penalty(
    x: Tensor,
    ref_logprobs: Tensor | float,
    estimator: KLEstimator = "k3",
    gradient: KLGradient = "reverse",
) -> tuple[Tensor, Tensor]:
    if gradient == "pathwise":
        return _kl(x, ref_logprobs, estimator)
    log_ratio = x - ref_logprobs
    if estimator == "k3":
        value, _ = _k3(log_ratio)
    else:
        value = kl(log_ratio, 0.0, estimator)
    return value, log_ratio if gradient == "reverse" else torch.zeros_like(log_ratio)


def _k3(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return k3 of D, ``bounded_expm1(-D) + D``, and ``expm1(min(-D, 20))``, minus its slope."""
    if surely_above(log_ratio, -EXPONENT_LIMIT):
        minus_slope = log_ratio.neg().expm1_()
        return minus_slope + log_ratio, minus_slope
    tail = log_ratio.clamp(max=-EXPONENT_LIMIT).add_(EXPONENT_LIMIT).mul_(-_PEAK)  # exp(20) max(-D - 20, 0)
    minus_slope = log_ratio.clamp(min=-EXPONENT_LIMIT).neg_().expm1_()
    return tail.add_(minus_slope).add_(log_ratio), minus_slope

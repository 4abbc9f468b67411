"""Weights for tokens that another policy drew: functions of the log-ratio ``d = old_logprob - sampler_logprob``.

``d`` belongs to a token, or to a sequence: its sum over the tokens (a product of ratios) or its mean (their geometric
mean). Weights are constants: no gradient flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import bounded_exp

__all__ = ["masked_weight", "truncated_weight"]


def truncated_weight(log_ratio: Tensor, low: float = 0.0, high: float = 2.0) -> Tensor:
    """Return the truncated importance weight, ``clip(exp(d), low, high)``.

    With ``low`` = 0 its bias in the expectation of f under the sampler q is ``-E_q[(exp(d) - high)^+ f]``.

    Args:
        log_ratio: d, nats; any shape.
        low, high: the range of weights, 0 <= low <= high.

    Returns:
        One weight per entry, shape of ``log_ratio``, detached.

    Source: E. Ionides, "Truncated importance sampling", 2008; for samplers: F. Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training", 2025.
    """
    return bounded_exp(log_ratio.detach()).clamp(low, high)


def masked_weight(log_ratio: Tensor, low: float = 0.5, high: float = 5.0) -> Tensor:
    """Return the masked importance weight, ``exp(d)`` where it lies within [low, high], else 0.

    Its bias in the expectation of f under the sampler q is ``-E_q[exp(d) f 1(exp(d) outside)]``.

    Args:
        log_ratio: d, nats; any shape.
        low, high: the range of weights that are kept, 0 <= low <= high, both ends included.

    Returns:
        One weight per entry, shape of ``log_ratio``, detached.

    Source: IcePop, in "Every step evolves", arXiv:2510.18855, section 3.
    """
    ratio = bounded_exp(log_ratio.detach())
    return torch.where((ratio < low) | (ratio > high), torch.zeros_like(ratio), ratio)

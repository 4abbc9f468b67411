"""Preference losses: one value per pair of a chosen and a rejected response."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from .numerics import log1mexp

__all__ = ["capped_log_odds", "dpo_sigmoid", "log_odds_ratio"]


def dpo_sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Return the loss of each pair's scaled margin z, ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``.

    Its derivative with respect to z is ``-(1 - e) sigmoid(-z) + e sigmoid(z)``.

    Args:
        margin: beta (h_chosen - h_rejected), [P].
        label_smoothing: e, the assumed rate of flipped labels, in [0, 0.5).

    Returns:
        One value per pair, [P].

    Source: DPO, arXiv:2305.18290, equation 7; smoothing: E. Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    return -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def log_odds_ratio(chosen: Tensor, rejected: Tensor, max_prob: float) -> Tensor:
    """Return ``log odds(p_chosen) - log odds(p_rejected)`` of each pair.

    Args:
        chosen, rejected: mean log-prob of each response, nats, [P].
        max_prob: where the tangent of `capped_log_odds` takes over, in (0, 1).

    Returns:
        One value per pair, [P].

    Source: ORPO, arXiv:2403.07691, equation 4.
    """
    return capped_log_odds(chosen, max_prob) - capped_log_odds(rejected, max_prob)


def capped_log_odds(logprob: Tensor, max_prob: float) -> Tensor:
    """Return ``log(p / (1 - p))`` of p = exp(logprob), continued by its tangent beyond ``max_prob``.

    The slope 1 / (1 - p) reaches 1e6 for a confident, short response; beyond ``max_prob`` it stays at
    1 / (1 - max_prob).

    Args:
        logprob: log of a probability, nats, at most 0; any shape.
        max_prob: where the tangent takes over, in (0, 1).

    Returns:
        Log odds, shape of ``logprob``.
    """
    limit = math.log(max_prob)
    inside = logprob.clamp(max=limit)
    return inside - log1mexp(inside) + (logprob - limit).clamp(min=0.0) / (1.0 - max_prob)

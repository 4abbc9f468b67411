"""The formulas of the losses: pure functions of tensors, unreduced, each with its equation and source."""

from __future__ import annotations

from .kl import KLEstimator, kl_value
from .likelihood import negative_log_likelihood
from .numerics import bounded_exp, bounded_expm1, log1mexp
from .policy import clipped_surrogate
from .preference import capped_log_odds, dpo_sigmoid, log_odds_ratio

__all__ = [
    "KLEstimator",
    "bounded_exp",
    "bounded_expm1",
    "capped_log_odds",
    "clipped_surrogate",
    "dpo_sigmoid",
    "kl_value",
    "log1mexp",
    "log_odds_ratio",
    "negative_log_likelihood",
]

"""The formulas of the losses: pure functions of tensors, unreduced, each with its equation and source.

Beside a formula per token stands its closed form, value and slope in one pass; see `closed_form_of`.
"""

from __future__ import annotations

from ...deprecation import moved
from .closed_form import closed_form, closed_form_of
from .correction import masked_weight, truncated_weight
from .kl import KLEstimator, KLGradient, kl, kl_penalty
from .likelihood import nll
from .numerics import bounded_exp, bounded_expm1, log1mexp
from .old_names import clipped_surrogate as clipped_surrogate
from .old_names import dpo_sigmoid as dpo_sigmoid
from .old_names import kl_value as kl_value
from .policy import cispo, dro, gspo_token, importance_sampling, policy_gradient, ppo_clip
from .preference import chosen_nll, dpo, kto, log_odds, log_odds_ratio, odds_ratio, reference_point, simpo

__all__ = [
    "KLEstimator",
    "KLGradient",
    "bounded_exp",
    "bounded_expm1",
    "chosen_nll",
    "cispo",
    "closed_form",
    "closed_form_of",
    "dpo",
    "dro",
    "gspo_token",
    "importance_sampling",
    "kl",
    "kl_penalty",
    "kto",
    "log1mexp",
    "log_odds",
    "log_odds_ratio",
    "masked_weight",
    "nll",
    "odds_ratio",
    "policy_gradient",
    "ppo_clip",
    "reference_point",
    "simpo",
    "truncated_weight",
]

__getattr__ = moved(
    __name__,
    {
        "capped_log_odds": ("losses.functional", "log_odds"),
        "negative_log_likelihood": ("losses.functional", "nll"),
    },
)

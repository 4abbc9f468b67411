"""Losses on per-token log-probs. Nothing here knows a model, a trainer or a datum class."""

from __future__ import annotations

from ..deprecation import moved
from .adapt import batch_from_datums
from .aggregation import AGGREGATIONS, Aggregation, fixed_length
from .base import Loss, LossOutput, Part, Term
from .batch import TokenBatch
from .functional import (
    bounded_exp,
    log1mexp,
    log_odds_ratio,
)
from .functional.old_names import clipped_surrogate as clipped_surrogate
from .functional.old_names import dpo_sigmoid as dpo_sigmoid
from .functional.old_names import kl_value as kl_value
from .metrics import Metric, combine_metrics, wire_metrics
from .parts.advantages import GroupAdvantages, group_advantages
from .parts.clip import ClipRange
from .parts.kl import KL
from .policy import GRPO, PPO, ImportanceSampling
from .preference import DPO, ORPO
from .recipes import Recipe, preset, preset_names, recipe
from .registry import Registry, get_loss, loss_names, register, registry
from .streaming import TokenStream
from .supervised import CrossEntropy

for _loss in (CrossEntropy, ImportanceSampling, PPO, GRPO, DPO, ORPO):
    register(_loss)

__all__ = [
    "AGGREGATIONS",
    "DPO",
    "GRPO",
    "KL",
    "ORPO",
    "PPO",
    "Aggregation",
    "ClipRange",
    "CrossEntropy",
    "GroupAdvantages",
    "ImportanceSampling",
    "Loss",
    "LossOutput",
    "Metric",
    "Part",
    "Recipe",
    "Registry",
    "Term",
    "TokenBatch",
    "TokenStream",
    "batch_from_datums",
    "bounded_exp",
    "combine_metrics",
    "fixed_length",
    "get_loss",
    "group_advantages",
    "log1mexp",
    "log_odds_ratio",
    "loss_names",
    "preset",
    "preset_names",
    "recipe",
    "register",
    "registry",
    "wire_metrics",
]

__getattr__ = moved(
    __name__,
    {
        "RatioBand": ("losses", "ClipRange"),
        "capped_log_odds": ("losses.functional", "log_odds"),
        "negative_log_likelihood": ("losses.functional", "nll"),
    },
)

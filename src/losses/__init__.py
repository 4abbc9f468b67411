"""Losses on per-token log-probs. Nothing here knows a model, a trainer or a datum class."""

from __future__ import annotations

from .adapt import batch_from_datums
from .advantages import GroupAdvantages, group_advantages
from .aggregation import AGGREGATIONS, Aggregation, fixed_length
from .base import Loss, LossOutput, Part, Term
from .batch import TokenBatch
from .kl import KL, kl_value
from .metrics import Metric, combine_metrics, wire_metrics
from .numerics import bounded_exp, capped_log_odds, log1mexp
from .policy.losses import GRPO, PPO, ImportanceSampling
from .preference.losses import DPO, ORPO, dpo_sigmoid, log_odds_ratio
from .ratio import RatioBand, clipped_surrogate
from .recipes import Recipe, preset, preset_names, recipe
from .registry import Registry, get_loss, loss_names, register, registry
from .supervised.cross_entropy import CrossEntropy, negative_log_likelihood

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
    "CrossEntropy",
    "GroupAdvantages",
    "ImportanceSampling",
    "Loss",
    "LossOutput",
    "Metric",
    "Part",
    "RatioBand",
    "Recipe",
    "Registry",
    "Term",
    "TokenBatch",
    "batch_from_datums",
    "bounded_exp",
    "capped_log_odds",
    "clipped_surrogate",
    "combine_metrics",
    "dpo_sigmoid",
    "fixed_length",
    "get_loss",
    "group_advantages",
    "kl_value",
    "log1mexp",
    "log_odds_ratio",
    "loss_names",
    "negative_log_likelihood",
    "preset",
    "preset_names",
    "recipe",
    "register",
    "registry",
    "wire_metrics",
]

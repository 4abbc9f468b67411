"""Losses on per-token log-probs. Nothing here knows a model, a trainer or a datum class."""

from __future__ import annotations

from ..deprecation import moved
from .aggregation import AGGREGATIONS, Aggregation, fixed_length
from .base import Loss
from .batch.adapt import batch_from_datums
from .batch.layout import Layout, Packed, Padded
from .batch.token_batch import TokenBatch
from .config import keys
from .counting import CountedLoss
from .evaluation.metrics import DeferredMetric, Metric, combine_metrics, wire_metrics
from .evaluation.output import LossOutput, Part
from .evaluation.pair_terms import PairTerm, Responses
from .evaluation.sequence_terms import SequenceTerm
from .evaluation.streaming import TokenStream
from .evaluation.terms import Summand, Term, TokenTerm
from .functional import (
    bounded_exp,
    log1mexp,
    log_odds_ratio,
)
from .functional.old_names import clipped_surrogate as clipped_surrogate
from .functional.old_names import dpo_sigmoid as dpo_sigmoid
from .functional.old_names import kl_value as kl_value
from .parts.advantages import GroupAdvantages, group_advantages
from .parts.clip import ClipRange
from .parts.correction import Correction, Rejection
from .parts.kl import KL
from .policy import CISPO, DRO, GRPO, GSPO, PPO, ImportanceSampling
from .preference import DPO, KTO, ORPO, SimPO
from .presets import preset, preset_names
from .recipes import Recipe, recipe
from .registry import Registry, get_loss, loss_names, register, registry
from .supervised import CrossEntropy

__all__ = [
    "AGGREGATIONS",
    "CISPO",
    "DPO",
    "DRO",
    "GRPO",
    "GSPO",
    "KL",
    "KTO",
    "ORPO",
    "PPO",
    "Aggregation",
    "ClipRange",
    "Correction",
    "CountedLoss",
    "CrossEntropy",
    "DeferredMetric",
    "GroupAdvantages",
    "ImportanceSampling",
    "Layout",
    "Loss",
    "LossOutput",
    "Metric",
    "Packed",
    "Padded",
    "PairTerm",
    "Part",
    "Recipe",
    "Registry",
    "Rejection",
    "Responses",
    "SequenceTerm",
    "SimPO",
    "Summand",
    "Term",
    "TokenBatch",
    "TokenStream",
    "TokenTerm",
    "batch_from_datums",
    "bounded_exp",
    "combine_metrics",
    "fixed_length",
    "get_loss",
    "group_advantages",
    "keys",
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
        "Counted": ("losses", "CountedLoss"),
        "RatioBand": ("losses", "ClipRange"),
        "capped_log_odds": ("losses.functional", "log_odds"),
        "negative_log_likelihood": ("losses.functional", "nll"),
    },
)

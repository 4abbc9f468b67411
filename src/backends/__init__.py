"""Backends: what pulls a cotangent back through a model."""

from __future__ import annotations

from .futures import FinishedFuture, Future
from .native import TorchBackend, with_reference
from .protocol import CustomLoss, NormalizationMode, ReferenceModel, SamplingBackend, TrainerBackend
from .types import (
    AdamParams,
    ForwardBackwardOutput,
    LedgerEntry,
    OptimStepOutput,
    Plan,
    Rollout,
    SamplingParams,
    SaveStateOutput,
)

__all__ = [
    "AdamParams",
    "CustomLoss",
    "FinishedFuture",
    "ForwardBackwardOutput",
    "Future",
    "LedgerEntry",
    "NormalizationMode",
    "OptimStepOutput",
    "Plan",
    "ReferenceModel",
    "Rollout",
    "SamplingBackend",
    "SamplingParams",
    "SaveStateOutput",
    "TorchBackend",
    "TrainerBackend",
    "with_reference",
]

"""Backends: what pulls a cotangent back through a model."""

from __future__ import annotations

from .fake import FakeBackend
from .futures import FinishedFuture, Future
from .native import Head, ModelAdapter, TorchBackend, logprob_surrogate, selected_logprobs
from .protocol import CustomLoss, NormalizationMode, ReferenceModel, SamplingBackend, TrainerBackend
from .reference import with_reference
from .remote import RemoteBackend, connect
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
    "FakeBackend",
    "FinishedFuture",
    "ForwardBackwardOutput",
    "Future",
    "Head",
    "LedgerEntry",
    "ModelAdapter",
    "NormalizationMode",
    "OptimStepOutput",
    "Plan",
    "ReferenceModel",
    "RemoteBackend",
    "Rollout",
    "SamplingBackend",
    "SamplingParams",
    "SaveStateOutput",
    "TorchBackend",
    "TrainerBackend",
    "connect",
    "logprob_surrogate",
    "selected_logprobs",
    "with_reference",
]

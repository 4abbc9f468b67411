"""Backends: what pulls a cotangent back through a model."""

from __future__ import annotations

from ..deprecation import moved
from ..ops import Head, logprob_surrogate, selected_logprobs
from .fake import FakeBackend
from .futures import FinishedFuture, Future
from .native import CausalLM, HFModel, TorchBackend
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
    "CausalLM",
    "CustomLoss",
    "FakeBackend",
    "FinishedFuture",
    "ForwardBackwardOutput",
    "Future",
    "HFModel",
    "Head",
    "LedgerEntry",
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

__getattr__ = moved(__name__, {"ModelAdapter": ("backends", "CausalLM")})

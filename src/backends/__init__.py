"""Backends: what pulls a cotangent back through a model."""

from __future__ import annotations

from ..deprecation import moved
from ..ops import Head, logprob_surrogate, selected_logprobs
from .base import Backend
from .calls.cotangents import evaluate_all, summarize
from .calls.prepared import PreparedCall
from .calls.requests import ScoreRequest
from .engine import Call, Engine, EngineLimits, Gradient
from .fake import FakeBackend
from .native import CausalLM, HFModel, TorchBackend
from .operations.futures import FinishedFuture, Future
from .operations.normalization import Divisor, Ledger
from .protocol import CustomLoss, NormalizationMode, ReferenceModel, SamplingBackend, TrainerBackend
from .reference import with_reference, with_reference_point
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
    "Backend",
    "Call",
    "CausalLM",
    "CustomLoss",
    "Divisor",
    "Engine",
    "EngineLimits",
    "FakeBackend",
    "FinishedFuture",
    "ForwardBackwardOutput",
    "Future",
    "Gradient",
    "HFModel",
    "Head",
    "Ledger",
    "LedgerEntry",
    "NormalizationMode",
    "OptimStepOutput",
    "Plan",
    "PreparedCall",
    "ReferenceModel",
    "RemoteBackend",
    "Rollout",
    "SamplingBackend",
    "SamplingParams",
    "SaveStateOutput",
    "ScoreRequest",
    "TorchBackend",
    "TrainerBackend",
    "connect",
    "evaluate_all",
    "logprob_surrogate",
    "selected_logprobs",
    "summarize",
    "with_reference",
    "with_reference_point",
]

__getattr__ = moved(__name__, {"ModelAdapter": ("backends", "CausalLM")})

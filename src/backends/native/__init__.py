"""The native backend: PyTorch models in this process."""

from __future__ import annotations

from ...ops.logprobs import logprob_surrogate, selected_logprobs
from .backend import TorchBackend
from .causal_lm import Head, ModelAdapter
from .execution.retained import HeldForward
from .models.hf import HFModel

__all__ = [
    "HFModel",
    "Head",
    "HeldForward",
    "ModelAdapter",
    "TorchBackend",
    "logprob_surrogate",
    "selected_logprobs",
]

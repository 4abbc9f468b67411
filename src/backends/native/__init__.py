"""The native backend: PyTorch models in this process."""

from __future__ import annotations

from .adapter import Head, ModelAdapter
from .backend import TorchBackend
from .head import logprob_surrogate, selected_logprobs
from .held import HeldForward
from .hf import HFModel

__all__ = [
    "HFModel",
    "Head",
    "HeldForward",
    "ModelAdapter",
    "TorchBackend",
    "logprob_surrogate",
    "selected_logprobs",
]

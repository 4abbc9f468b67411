"""The native backend: PyTorch models in this process."""

from __future__ import annotations

from ...deprecation import moved
from ...ops import Head, logprob_surrogate, selected_logprobs
from .backend import TorchBackend
from .causal_lm import CausalLM
from .execution.retained import RetainedForward
from .models.hf import HFModel

__all__ = [
    "CausalLM",
    "HFModel",
    "Head",
    "RetainedForward",
    "TorchBackend",
    "logprob_surrogate",
    "selected_logprobs",
]

__getattr__ = moved(
    __name__, {"HeldForward": ("backends.native", "RetainedForward"), "ModelAdapter": ("backends", "CausalLM")}
)

"""pullback: losses for post-training language models, and backends that pull them back through a model."""

from __future__ import annotations

from . import backends, datums, errors, losses
from .backends import AdamParams, SamplingParams, TorchBackend, connect, with_reference, with_reference_point
from .datums import Datum, ModelInput, TensorData
from .losses import TokenBatch, group_advantages, loss_names, preset, recipe, register

__version__ = "0.1.0"

__all__ = [
    "AdamParams",
    "Datum",
    "ModelInput",
    "SamplingParams",
    "TensorData",
    "TokenBatch",
    "TorchBackend",
    "backends",
    "connect",
    "datums",
    "errors",
    "group_advantages",
    "loss_names",
    "losses",
    "preset",
    "recipe",
    "register",
    "with_reference",
    "with_reference_point",
]

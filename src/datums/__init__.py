"""Datums: the tokens, and all that a loss needs beside the log-probs."""

from __future__ import annotations

from .types import Datum, ModelInput, TensorData
from .validation import validate

__all__ = ["Datum", "ModelInput", "TensorData", "validate"]

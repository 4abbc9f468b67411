"""Datums: the tokens, and all that a loss needs beside the log-probs."""

from __future__ import annotations

from .builders import (
    datum_from_prompt_completion,
    datum_from_spans,
    datum_from_tokens_weights,
    preference_pair,
)
from .chat import datum_from_messages
from .convert import from_tinker, to_fireworks, to_tinker
from .explain import explain
from .mismatched import mismatched
from .rollouts import Turn, datum_from_rollout, datum_from_turns, turn_from_sglang, turns_from_vllm
from .rows import RowNote, RowsReport, from_rows
from .types import Datum, ModelInput, TensorData
from .validation import validate

__all__ = [
    "Datum",
    "ModelInput",
    "RowNote",
    "RowsReport",
    "TensorData",
    "Turn",
    "datum_from_messages",
    "datum_from_prompt_completion",
    "datum_from_rollout",
    "datum_from_spans",
    "datum_from_tokens_weights",
    "datum_from_turns",
    "explain",
    "from_rows",
    "from_tinker",
    "mismatched",
    "preference_pair",
    "to_fireworks",
    "to_tinker",
    "turn_from_sglang",
    "turns_from_vllm",
    "validate",
]

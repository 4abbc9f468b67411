"""A datum as a table for people: what is trained on what."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["explain"]

_COLUMNS: Final = {
    "weights": "weight",
    "advantages": "advantage",
    "logprobs": "logprob",
    "old_logprobs": "old",
    "ref_logprobs": "ref",
    "sequence_ratio_mask": "in ratio",
}
_TARGET: Final = 2  # which column is the target's
_DEFAULT: Final = "1 (default)"  # the weight of a target to which no weight is given
_MORE, _LESS, _PLAIN, _END = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[0m"  # green, red, faint


def explain(datum: Any, tokenizer: Any = None, color: bool | None = None) -> str:
    """Return the datum as aligned lines: position, token, the target after it, and the numbers that belong to the target.

    Args:
        datum: a `Datum`, with ``target_tokens``, or scored on its own next tokens.
        tokenizer: has ``decode``; without it token ids are shown.
        color: print trained targets in green (red where the advantage is negative: less of this), and lines that are not
            trained faintly; None: where the output is a terminal and the environment has no ``NO_COLOR``.
    """
    inputs, tokens = datum.loss_fn_inputs, datum.model_input.to_ints()
    targets = inputs["target_tokens"].tolist() if "target_tokens" in inputs else tokens[1:]
    columns = {title: inputs[key].tolist() for key, title in _COLUMNS.items() if key in inputs}
    shown = columns if "weights" in inputs else {"weight": [_DEFAULT] * len(targets), **columns}
    rows = [["position", "token", "target", *shown]]
    for j, target in enumerate(targets):
        numbers = [_number(column[j]) if j < len(column) else "missing" for column in shown.values()]
        rows.append([str(j), _token(tokens[j], tokenizer), _token(target, tokenizer), *numbers])
    widths = [*(max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)), 0]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if _colored() if color is None else color:
        padded[1:] = [_painted(row, columns, j) for j, row in enumerate(padded[1:])]
    return "\n".join(" | ".join(row) for row in padded)


def _colored() -> bool:
    """Whether the output is a terminal that wants color (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


def _painted(row: list[str], columns: Mapping[str, Sequence[Any]], j: int) -> list[str]:
    weight = _entry(columns, "weight", j, 1.0)
    if not weight:
        return [f"{_PLAIN}{cell}{_END}" for cell in row]
    color = _LESS if _entry(columns, "advantage", j, 1.0) < 0 else _MORE
    return [*row[:_TARGET], f"{color}{row[_TARGET]}{_END}", *row[_TARGET + 1 :]]


def _entry(columns: Mapping[str, Sequence[Any]], title: str, j: int, missing: float) -> float:
    values = columns.get(title, ())
    value = values[j] if j < len(values) else missing
    return float(max(value, key=abs)) if isinstance(value, list) else float(value)


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    return " ".join(_number(v) for v in value) if isinstance(value, list) else f"{value:g}"


def _token(token: Any, tokenizer: Any) -> str:
    if isinstance(token, list):
        return " ".join(_token(t, tokenizer) for t in token)
    return str(token) if tokenizer is None else f"{tokenizer.decode([token])!r}"

"""explain: a datum as a table, so that a person can see what is trained on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

__all__ = ["explain"]

_COLUMNS: Final = {
    "weights": "weight",
    "advantages": "advantage",
    "logprobs": "logprob",
    "old_logprobs": "old",
    "ref_logprobs": "ref",
}


class _Datum(Protocol):
    """What of a `Datum` is shown; types.py imports this module, so that it cannot be named here."""

    @property
    def model_input(self) -> Any: ...

    @property
    def loss_fn_inputs(self) -> Mapping[str, Any]: ...


def explain(datum: _Datum, tokenizer: Any = None) -> str:
    """Return the datum as aligned lines: position, token, the target after it, and the numbers that belong to the target.

    Args:
        datum: a `Datum` with ``target_tokens``, or one that is scored on its own next tokens.
        tokenizer: has ``decode``; without it token ids are shown.
    """
    inputs, tokens = datum.loss_fn_inputs, datum.model_input.to_ints()
    targets = inputs["target_tokens"].tolist() if "target_tokens" in inputs else tokens[1:]
    columns = {title: inputs[key].tolist() for key, title in _COLUMNS.items() if key in inputs}
    rows = [["position", "token", "target", *columns]]
    for j, target in enumerate(targets):
        numbers = [_number(column[j]) if j < len(column) else "missing" for column in columns.values()]
        rows.append([str(j), _token(tokens[j], tokenizer), _token(target, tokenizer), *numbers])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: Any) -> str:
    return " ".join(_number(v) for v in value) if isinstance(value, list) else f"{value:g}"


def _token(token: Any, tokenizer: Any) -> str:
    if isinstance(token, list):
        return " ".join(_token(t, tokenizer) for t in token)
    return str(token) if tokenizer is None else f"{tokenizer.decode([token])!r}"

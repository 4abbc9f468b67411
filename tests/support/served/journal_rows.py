"""Rows of a journal that thousands of sessions have filled, for tests of what they cost."""

from __future__ import annotations

from typing import Any

from pullback.service.durability.database import Statement
from pullback.service.durability.schema import checksum


def rows_of(i: int) -> list[tuple[Any, ...]]:
    """Return the rows of one session: its table, and its values."""
    model, moment = f"sess-{i}:train:0", float(i)
    rows: list[tuple[Any, ...]] = [("sessions", f"sess-{i}", "me", "null", moment, None)]
    rows.append(("models", model, f"sess-{i}", "me", '{"rank": 2}', "null", None, moment))
    for kind in ("weights", "sampler_weights"):
        uri = f"tinker://{model}/{kind}/step-{i}"
        rows.append(("checkpoints", uri, model, kind, f"step-{i}", "me", 1, 10, "null", moment, None))
    return rows


def written(table: str, *values: Any) -> Statement:
    """Return what writes a row, in a transaction with others."""
    return f"INSERT INTO {table} VALUES ({'?, ' * len(values)}?)", (*values, checksum(table, values))

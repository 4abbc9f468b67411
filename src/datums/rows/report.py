"""What became of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from .columns import RowKind

__all__ = ["RowNote", "RowsReport"]

_SHOWN: Final = 10


@final
@dataclass(frozen=True)
class RowNote:
    """What happened to one row, and why."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@final
@dataclass(frozen=True)
class RowsReport:
    """What `from_rows` made of its rows.

    Attributes:
        kind: their format.
        rows: how many there were.
        datums: how many were made; a pair is two.
        tokens: of all model inputs.
        trained_tokens: targets of another weight than 0.
        dropped: rows of which nothing was made.
        truncated: rows that were shortened.
        merged_tokens: trained tokens that hold characters of the prompt or the template as well.
        unused_columns: columns that were not read.
        untrained_roles: roles, beside system, user, tool and developer, whose turns are not trained.
        with_nulls: chats whose tool calls or tools hold None, which the template writes as null.
    """

    kind: RowKind
    rows: int
    datums: int
    tokens: int
    trained_tokens: int
    dropped: tuple[RowNote, ...] = ()
    truncated: tuple[RowNote, ...] = ()
    merged_tokens: int = 0
    unused_columns: tuple[str, ...] = ()
    untrained_roles: tuple[str, ...] = ()
    with_nulls: int = 0

    def __str__(self) -> str:
        lines = [
            f"{_count(self.rows, 'row')} of kind {self.kind}: {_count(self.datums, 'datum')}, {_count(self.tokens, 'token')}, "
            f"of which {self.trained_tokens:,} trained"
        ]
        lines += _notes("dropped", self.dropped) + _notes("truncated", self.truncated)
        if self.merged_tokens:
            lines.append(f"trained tokens that begin or end in text that is not trained: {self.merged_tokens:,}")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        if self.untrained_roles:
            lines.append(f"roles whose turns are not trained: {', '.join(map(repr, self.untrained_roles))}")
        if self.with_nulls:
            lines.append(
                f"chats with null in tool calls or tools (tables fill it in for missing keys): {self.with_nulls:,}"
            )
        return "\n".join(lines)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _notes(title: str, notes: Sequence[RowNote]) -> list[str]:
    if not notes:
        return []
    more = [f"  and {len(notes) - _SHOWN:,} more"] if len(notes) > _SHOWN else []
    return [f"{title}: {_count(len(notes), 'row')}", *(f"  {note}" for note in notes[:_SHOWN]), *more]

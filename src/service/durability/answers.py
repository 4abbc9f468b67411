"""Operations and their answers, and how the journal writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

from .database import damaged_row
from .schema import COLUMNS, answer_checksum, checksum, is_whole

__all__ = [
    "ACCEPTED",
    "OPERATION",
    "Accepted",
    "Answer",
    "Failure",
    "Operation",
    "accepted_of",
    "encoded",
    "operation_of",
]

ACCEPTED: Final = f"SELECT {', '.join(COLUMNS['operations'])}, checksum FROM operations"
OPERATION: Final = ACCEPTED.replace(" FROM", ", form, answer_checksum, answer FROM")


@final
@dataclass(frozen=True)
class Failure:
    """What a client reads of a failed operation.

    Attributes:
        text: the error's.
        category: whose fault it is, ``user`` or ``server``.
    """

    text: str
    category: str


Answer: TypeAlias = bytes | dict[str, Any] | Failure


@final
@dataclass(frozen=True)
class Accepted:
    """One accepted operation of one queue."""

    request: str
    owner: str
    queue: str
    number: int | None
    digest: str
    kind: str


@final
@dataclass(frozen=True)
class Operation:
    """An accepted operation with its answer: None until it has ended, ``expired`` if it was thrown away."""

    accepted: Accepted
    answer: Answer | None
    expired: bool

    @property
    def owner(self) -> str:
        """Who may read the answer."""
        return self.accepted.owner

    @property
    def kind(self) -> str:
        """What it does."""
        return self.accepted.kind


def accepted_of(row: Sequence[Any]) -> Accepted:
    """Read a row of `ACCEPTED`, and check its checksum."""
    *values, written = row
    if not is_whole(checksum("operations", values), written):
        raise damaged_row("operations")
    return Accepted(*values[:-1])


def operation_of(row: Sequence[Any]) -> Operation:
    """Read a row of `OPERATION`, and check its checksums."""
    accepted, (form, written, blob) = accepted_of(row[:-3]), row[-3:]
    if not is_whole(answer_checksum(accepted.request, form, blob), written):
        raise damaged_row("operations")
    return Operation(accepted, None if blob is None else _decoded(form, blob), form is not None and blob is None)


def encoded(answer: Answer) -> tuple[str, bytes]:
    """Return the form of an answer, and how it is written."""
    if isinstance(answer, bytes):
        return "protobuf", answer
    if isinstance(answer, Failure):
        return "failure", json.dumps([answer.text, answer.category]).encode()
    return "json", json.dumps(answer).encode()


def _decoded(form: str, blob: bytes) -> Answer:
    if form == "protobuf":
        return bytes(blob)
    content = json.loads(blob)
    return Failure(*content) if form == "failure" else dict(content)

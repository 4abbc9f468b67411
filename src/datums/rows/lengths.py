"""What is done with rows that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final

from ...errors import DatumError
from ..builders import check_max_length
from ..chat import Encoded

__all__ = ["Lengths", "Overlong", "Side"]

Overlong: TypeAlias = Literal["error", "drop", "truncate"]
Side: TypeAlias = Literal["right", "left"]


@final
@dataclass(frozen=True)
class FittedRow:
    """A row that fits: its sides, none where it is dropped; and what was done to it, where something was."""

    sides: tuple[Encoded, ...]
    reason: str | None = None


@final
@dataclass(frozen=True)
class Lengths:
    """The longest model input, and what becomes of a longer one.

    Args:
        max_length: tokens of the model input; None: any.
        overlong: ``error``, ``drop`` or ``truncate``.
        side: where it is truncated. On the left both sides of a pair lose the same tokens of their prompt.

    Raises:
        DatumError: an option has no such value.
    """

    max_length: int | None = None
    overlong: Overlong = "error"
    side: Side = "right"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("overlong", self.overlong, ("error", "drop", "truncate")),
            ("truncation_side", self.side, ("right", "left")),
        ):
            if value not in known:
                raise DatumError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        check_max_length(self.max_length)

    def fit(self, sides: Sequence[Encoded]) -> FittedRow:
        """Return the sides of a row as they fit.

        Raises:
            DatumError: they are too long, and that is an error.
        """
        longest = max(len(side.ids) for side in sides) - 1
        if self.max_length is None or longest <= self.max_length:
            return _checked(tuple(sides), None)
        what = f"its model input has {longest} tokens, more than max_length={self.max_length}"
        if self.overlong == "error":
            raise DatumError(f"{what}; shorten it, or give overlong='drop' or 'truncate'")
        if self.overlong == "drop":
            return FittedRow((), what)
        excess = longest - self.max_length
        if self.side == "right":
            return _checked(tuple(_cut(side, 0, self.max_length + 1) for side in sides), f"{what}: cut on the right")
        prompt = min(side.first_trained for side in sides)
        if len(sides) > 1 and excess >= prompt:
            return FittedRow((), f"{what}, and its prompt has not so many to lose")
        return _checked(tuple(_cut(side, excess, len(side.ids)) for side in sides), f"{what}: cut on the left")


def _cut(side: Encoded, start: int, stop: int) -> Encoded:
    return replace(side, ids=side.ids[start:stop], weights=side.weights[start:stop])


def _checked(sides: tuple[Encoded, ...], reason: str | None) -> FittedRow:
    """Drop a row of which nothing is left to train."""
    if any(len(side.ids) < 2 or not any(side.weights[1:]) for side in sides):
        return FittedRow((), f"{reason}, which leaves nothing to train" if reason else "nothing of it is trained")
    if len(sides) == 2 and sides[0].ids == sides[1].ids:
        return FittedRow(
            (), f"{reason}, which leaves chosen and rejected the same" if reason else "chosen and rejected are the same"
        )
    return FittedRow(sides, reason)

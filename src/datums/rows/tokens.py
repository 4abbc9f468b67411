"""Rows that are tokenized already: ``input_ids``, and what of them is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from ...errors import DatumError, LengthError
from ..chat import Encoded
from ..types import ModelInput

__all__ = ["encoded_row"]

_UNTRAINED: Final = -100

_MASKS: Final = ("completion_mask", "assistant_masks")
_PER_TOKEN: Final = ("labels", *_MASKS, "attention_mask", "position_ids")


def encoded_row(row: Mapping[str, Any]) -> Encoded:
    """Return the tokens of a row and their weights.

    Args:
        row: ``input_ids`` int [T + 1]; ``labels`` int [T + 1], a copy of them with -100 where a token is not trained;
            ``completion_mask`` and ``assistant_masks`` [T + 1], 0 or 1; where several are given a token is trained that all
            of them train. ``attention_mask`` [T + 1], 0 on padding at the ends, which is cut off. ``position_ids`` [T + 1] and
            ``seq_lengths`` must say that it is one sequence.

    Raises:
        DatumError: labels are something else than the tokens, a mask is no mask, padding is inside, or several sequences are
            packed into the row.
        LengthError: a column has another length.
    """
    ids = _column("input_ids", row["input_ids"])
    columns = _columns_beside(row, ids)
    trained = torch.ones(ids.numel(), dtype=torch.bool)
    if "labels" in columns:
        trained &= _labelled(columns["labels"], ids)
    for name in _MASKS:
        if name in columns:
            trained &= _mask(name, columns[name])
    start, stop = _unpadded(columns["attention_mask"]) if "attention_mask" in columns else (0, ids.numel())
    _check_one_sequence(row.get("seq_lengths"), columns.get("position_ids"), start, stop)
    return Encoded(ids[start:stop].tolist(), trained[start:stop].float().tolist())


def _columns_beside(row: Mapping[str, Any], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the columns that a row has for its tokens.

    Raises:
        LengthError: one is longer or shorter.
    """
    columns = {name: _column(name, row[name]) for name in _PER_TOKEN if row.get(name) is not None}
    for name, column in columns.items():
        if column.shape != ids.shape:
            raise LengthError(f"{name} has {column.numel()} entries, but input_ids has {ids.numel()}")
    return columns


def _check_one_sequence(lengths: Any, positions: torch.Tensor | None, start: int, stop: int) -> None:
    """Check that the tokens of a row are one sequence: of several each would read those before it."""
    begins: list[int] = [] if lengths is None else _column("seq_lengths", lengths).cumsum(0)[:-1].tolist()
    if positions is not None:
        begins += [start + j + 1 for j in (positions[start:stop].diff() != 1).nonzero().flatten().tolist()]
    if begins:
        raise DatumError(
            f"several sequences are packed into it: one begins at token {begins[0]}, and would read the tokens before; give a "
            "row for each (backends pack them without that)"
        )


def _column(name: str, value: Any) -> torch.Tensor:
    try:
        return ModelInput.from_ints(value).tokens
    except (DatumError, TypeError, ValueError) as error:
        raise DatumError(f"column {name!r} must hold a list of integers: {error}") from error


def _labelled(labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    trained = labels != _UNTRAINED
    other = (trained & (labels != ids)).nonzero().flatten().tolist()
    if other:
        j = other[0]
        shifted = bool((labels[:-1] == ids[1:]).logical_or(~trained[:-1]).all())
        hint = "; these are shifted by one already, and labels are not" if shifted and len(other) > 1 else ""
        raise DatumError(
            f"labels[{j}] is {int(labels[j])}, but input_ids[{j}] is {int(ids[j])}: a label is the token itself, or -100 where "
            f"it is not trained{hint}"
        )
    return trained


def _mask(name: str, column: torch.Tensor) -> torch.Tensor:
    odd = ((column != 0) & (column != 1)).nonzero().flatten().tolist()
    if odd:
        raise DatumError(f"{name}[{odd[0]}] is {int(column[odd[0]])}; a mask is 0 or 1")
    return column == 1


def _unpadded(column: torch.Tensor) -> tuple[int, int]:
    """Return the range of tokens that are no padding."""
    places = _mask("attention_mask", column).nonzero().flatten().tolist()
    if not places:
        raise DatumError("attention_mask is 0 everywhere; the row is all padding")
    if places[-1] - places[0] + 1 != len(places):
        raise DatumError("attention_mask has zeros between ones; only padding at the ends can be cut off")
    return places[0], places[-1] + 1

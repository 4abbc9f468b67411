"""Rows of a data set to datums."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ...errors import DatumError, InvalidDatumsError
from ...losses.batch.keys import ROLE_CHOSEN, ROLE_REJECTED
from ..builders import datum_from_tokens_weights
from ..chat import Encoded, encode_all
from ..chat.messages import Turns
from ..prefix import common_prefix
from ..types import Datum
from .columns import Kind, RowKind, check_kind, kind_of, present, unused_columns
from .lengths import Lengths, Overlong, Side
from .reader import ReadOptions, RowReader
from .report import RowNote, RowsReport
from .sources import RowSource

__all__ = ["from_rows"]

_AT_ONCE: Final = 256  # texts that are tokenized together
_LONGEST_SHOWN: Final = 100  # characters of a path


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    kind: Kind = "auto",
    *,
    train_on: str | Collection[str] = "assistant",
    turns: Turns = "all",
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    append_eos: bool = True,
    max_length: int | None = None,
    overlong: Overlong = "error",
    truncation_side: Side = "right",
    ignore: Collection[str] = (),
) -> tuple[list[Datum], RowsReport]:
    """Build datums from the rows of a data set in the formats of Hugging Face and TRL.

    | kind | columns |
    | --- | --- |
    | ``messages`` | ``messages``, or ``conversations`` with role/content or from/value |
    | ``prompt_completion`` | ``prompt`` and ``completion``, both text or both messages |
    | ``preference`` | ``chosen`` and ``rejected``, both text or both messages; ``prompt``, or they begin with it |
    | ``unpaired_preference`` | ``prompt``, ``completion``, ``label`` (desirable or not) |
    | ``text`` | ``text``, all of it trained |
    | ``tokens`` | ``input_ids``, and ``labels`` or ``completion_mask`` or ``assistant_masks`` |

    Chats are read as `datum_from_messages` reads them; of an answer's messages those of ``train_on`` are trained. They may have
    the columns ``tools`` (a list, or one in JSON) and ``chat_template_kwargs``.

    Args:
        rows: dicts; a ``datasets.Dataset`` is such.
        tokenizer: of transformers; None for ``tokens``.
        kind: ``auto``: the one format that the columns of a row fit. All rows have the same.
        train_on: roles whose turns are trained.
        turns: ``all`` or the ``last`` trained one only.
        tools: for rows without a column of that name.
        chat_template_kwargs: for every row; a row's own come on top.
        append_eos: end raw texts with the end-of-text token, where they do not end so.
        max_length: longest model input, tokens.
        overlong: what becomes of longer ones: ``error``, ``drop`` or ``truncate``.
        truncation_side: where they are cut: ``right`` or ``left``.
        ignore: columns that would change what is trained, and are left out knowingly.

    Returns:
        The datums, in the order of the rows, and a report. A pair is two datums, chosen first, with the number of the row as
        ``pair_id``.

    Raises:
        InvalidDatumsError: lists every row that cannot be used, with the reason.
        DatumError: there are no rows, or an option has no such value.
    """
    check_kind(kind)
    reader = RowReader(tokenizer, ReadOptions(train_on, turns, tools, chat_template_kwargs, append_eos))
    lengths = Lengths(max_length, overlong, truncation_side)
    read = _read(rows, reader, kind, ignore)
    built = _build(read, tokenizer, lengths)
    problems = sorted({**read.problems, **built.problems}.items())
    if problems:
        raise InvalidDatumsError([f"row {number}: {problem}" for number, problem in problems])
    return built.data, RowsReport(
        kind=read.kinds[0],
        rows=read.rows,
        datums=len(built.data),
        tokens=sum(len(datum.model_input) for datum in built.data),
        trained_tokens=sum(_trained(datum) for datum in built.data),
        dropped=tuple(built.dropped),
        truncated=tuple(built.truncated),
        merged_tokens=built.merged,
        unused_columns=tuple(read.unused),
        untrained_roles=tuple(reader.untrained_roles),
        with_nulls=reader.with_nulls,
    )


@dataclass
class _Read:
    """What was read of all rows, and what is wrong with some of them."""

    sources: list[RowSource] = field(default_factory=list)
    kinds: list[RowKind] = field(default_factory=list)  # one, once a row was read
    unused: dict[str, None] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    rows: int = 0


@dataclass
class _Built:
    """What was made of them."""

    data: list[Datum] = field(default_factory=list)
    dropped: list[RowNote] = field(default_factory=list)
    truncated: list[RowNote] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    merged: int = 0


def _read(rows: Any, reader: RowReader, kind: Kind, ignore: Collection[str]) -> _Read:
    read = _Read()
    for number, row in enumerate(_rows(rows)):
        read.rows += 1
        try:
            columns = present(row, ignore)
            found = _same_kind(kind_of(columns, kind), read.kinds)
            read.unused.update(
                dict.fromkeys((*unused_columns(columns, found), *(name for name in ignore if name in row)))
            )
            read.sources.append(reader.read(number, columns, found))
        except DatumError as error:
            read.problems[number] = str(error)
    if read.rows == 0:
        raise DatumError("there are no rows")
    unknown = [name for name in ignore if name not in read.unused]
    if unknown and not read.problems:
        raise DatumError(f"ignore names {', '.join(map(repr, unknown))}, which no row has")
    return read


def _build(read: _Read, tokenizer: Any, lengths: Lengths) -> _Built:
    built = _Built()
    for start in range(0, len(read.sources), _AT_ONCE):
        sources = read.sources[start : start + _AT_ONCE]
        for source, sides in zip(sources, _encode(sources, tokenizer), strict=True):
            try:
                fitted = lengths.fit(_aligned(source, sides))
            except DatumError as error:
                built.problems[source.row] = str(error)
                continue
            note = RowNote(source.row, fitted.reason or "")
            if not fitted.sides:
                built.dropped.append(note)
            elif fitted.reason:
                built.truncated.append(note)
            built.merged += sum(side.merged for side in fitted.sides)
            built.data += _datums(source, fitted.sides)
    return built


def _encode(sources: Sequence[RowSource], tokenizer: Any) -> Iterator[list[Encoded]]:
    """Tokenize the texts of rows together; yield the sides of each row."""
    texts = [side for source in sources for side in source.sides if side.encoded is None]
    special = bool(texts) and texts[0].special  # rows are of one kind
    encoded = iter(encode_all(tokenizer, [side.text for side in texts], [side.spans for side in texts], special))
    for source in sources:
        yield [next(encoded) if side.encoded is None else side.encoded for side in source.sides]


def _aligned(source: RowSource, sides: list[Encoded]) -> list[Encoded]:
    """Return the sides of a pair with their answers beginning at the same token, so that both are given the same prompt."""
    if len(sides) == 1:
        return sides
    chosen, rejected = sides
    shared = common_prefix(chosen.ids, rejected.ids)
    if source.shared_prompt:
        if shared == 0:
            raise DatumError("chosen and rejected begin with no common token; give the prompt")
        return [replace(side, weights=[0.0] * shared + side.weights[shared:]) for side in sides]
    starts = [side.spans[0].start if side.spans else None for side in source.sides]
    if None in starts or starts[0] != starts[1]:
        return sides
    first = min(shared, *(side.first_trained for side in sides))
    return [_trained_from(side, first) for side in sides]


def _trained_from(side: Encoded, first: int) -> Encoded:
    begin = side.first_trained
    if begin == len(side.weights):
        return side
    return replace(side, weights=[0.0] * first + [side.weights[begin]] * (begin - first) + side.weights[begin:])


def _datums(source: RowSource, sides: Sequence[Encoded]) -> Iterator[Datum]:
    for side, role in zip(sides, (ROLE_CHOSEN, ROLE_REJECTED), strict=False):
        datum = datum_from_tokens_weights(*side.tensors())
        if len(sides) == 2:
            datum = datum.with_inputs(pair_id=[source.row], role=[role])
        yield datum if source.label is None else datum.with_inputs(label=[source.label])


def _trained(datum: Datum) -> int:
    return int((datum.loss_fn_inputs["weights"].to_torch() != 0).sum())


def _rows(rows: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(rows, Mapping):
        names = ", ".join(map(str, list(rows)[:5]))
        raise DatumError(f"rows is a dict ({names}); give one split of it, or a list with a dict for each row")
    if isinstance(rows, (str, bytes, os.PathLike)):
        raise DatumError(
            f"rows must be a list of dicts or a data set, got {type(rows).__name__}; read a file of JSON Lines by "
            f"rows = [json.loads(line) for line in open({_shortened(rows)})]"
        )
    if not isinstance(rows, Iterable):
        raise DatumError(f"rows must be a list of dicts or a data set, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DatumError(f"row {number} must be a dict, got {type(row).__name__}")
        yield row


def _shortened(path: Any) -> str:
    shown = repr(os.fspath(path))
    return shown if len(shown) <= _LONGEST_SHOWN else "path"


def _same_kind(found: RowKind, kinds: list[RowKind]) -> RowKind:
    if not kinds:
        kinds.append(found)
    if found != kinds[0]:
        raise DatumError(
            f"is of kind {found!r}, but the rows before it are of kind {kinds[0]!r}; convert them in two calls"
        )
    return found

"""The summary of a protobuf request, read from the lengths of its fields alone: what is too much is never decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self, final

from ...errors import DatumError, TooLargeError
from .sparse import MOST_FILLED

__all__ = ["RequestSummary", "WireBounds"]

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5  # wire types
_TOKEN_BYTES: Final = 4
_FILLED_PER_TOKEN: Final = 1024
_NO_REQUEST: Final = "the body is no ForwardBackwardRequest"


@final
@dataclass(frozen=True)
class WireBounds:
    """The most that one request may hold.

    Args:
        datums, tokens: of the operation.
        fields: of all messages in it, those that are not known included.
        filled: numbers of its sparse tensors once they are filled up, beside 1,024 for each of its tokens.
    """

    datums: int
    tokens: int
    fields: int
    filled: int


@final
class RequestSummary:
    """What a ``ForwardBackwardRequest`` holds.

    Attributes:
        model_id, seq_id, forward_only: the fields of that name, as far as they were read.
        datums, tokens, filled: how many, see `WireBounds`.
        excess: why it is too much; None: it is within the bounds.
    """

    def __init__(self, body: bytes, bounds: WireBounds) -> None:
        self._body, self._bounds = body, bounds
        self._fields = 0
        self.model_id, self.seq_id, self.forward_only = "", 0, False
        self.datums = self.tokens = self.filled = 0
        self.excess: TooLargeError | None = None

    @classmethod
    def of(cls, body: bytes, bounds: WireBounds) -> Self:
        """Summarize a body, up to the first bound that is exceeded.

        Raises:
            DatumError: the lengths do not fit the body.
        """
        summary = cls(body, bounds)
        try:
            summary._read()
        except TooLargeError as error:
            summary.excess = error
        except (IndexError, UnicodeDecodeError) as error:
            raise DatumError(f"{_NO_REQUEST}: it ends in the middle of a field") from error
        return summary

    def _read(self) -> None:
        spans = []
        for number, kind, start, end in self._walk(0, len(self._body)):
            if number == 1 and kind == _LENGTH:
                self.model_id = self._body[start:end].decode()
            elif number in (2, 6) and kind == _VARINT:
                value = _varint(self._body, start)[0]
                if number == 2:
                    self.seq_id = value
                else:
                    self.forward_only = bool(value)
            elif number == 3 and kind == _LENGTH:
                self.datums += 1
                _most(self.datums, self._bounds.datums, "datums")
                spans.append((start, end))
        for start, end in spans:
            self._read_datum(start, end)
        most = min(MOST_FILLED, self._bounds.filled + _FILLED_PER_TOKEN * self.tokens)
        _most(self.filled, most, "numbers of sparse tensors")

    def _read_datum(self, start: int, end: int) -> None:
        for number, kind, first, last in self._walk(start, end):
            if number == 1 and kind == _LENGTH:
                self._read_chunk(first, last)
            elif number == 2 and kind == _LENGTH:
                for key, form, begin, stop in self._walk(first, last):
                    if key == 2 and form == _LENGTH:
                        self._read_tensor(begin, stop)

    def _read_chunk(self, start: int, end: int) -> None:
        for number, kind, first, last in self._walk(start, end):
            if number == 1 and kind == _LENGTH:
                for key, form, begin, stop in self._walk(first, last):
                    if key == 1 and form == _LENGTH:
                        self.tokens += (stop - begin) // _TOKEN_BYTES
                        _most(self.tokens, self._bounds.tokens, "tokens")

    def _read_tensor(self, start: int, end: int) -> None:
        shape: list[int] = []
        sparse = False
        for number, kind, first, last in self._walk(start, end):
            sparse |= number == 2 and kind == _LENGTH
            if number == 4 and kind == _VARINT:
                shape.append(_varint(self._body, first)[0])
            elif number == 4 and kind == _LENGTH:
                while first < last:
                    value, first = _varint(self._body, first)
                    shape.append(value)
                    self._count()
        if sparse:
            self.filled += math.prod(shape)

    def _walk(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number and wire type of each field, and where its content begins and ends."""
        body = self._body
        while at < end:
            self._count()
            tag, at = _varint(body, at)
            kind, start = tag & 7, at
            if kind == _VARINT:
                at = _varint(body, at)[1]
            elif kind == _LENGTH:
                length, start = _varint(body, at)
                at = start + length
            elif kind in (_EIGHT, _FOUR):
                at += 8 if kind == _EIGHT else 4
            else:
                raise DatumError(f"{_NO_REQUEST}: it has a field of wire type {kind}")
            if at > end:
                raise DatumError(f"{_NO_REQUEST}: a field ends after what holds it")
            yield tag >> 3, kind, start, at

    def _count(self) -> None:
        self._fields += 1
        if self._fields > self._bounds.fields:
            _most(self._fields, self._bounds.fields, "fields")


def _most(count: int, most: int, what: str) -> None:
    if count > most:
        raise TooLargeError(f"more than {most} {what} in one operation; this server takes at most {most}")


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Return a number of up to 64 bits and where it ends; raises IndexError at the end of the body."""
    first = body[at]
    if first < 128:
        return first, at + 1
    value, shift = first & 127, 7
    while True:
        at += 1
        byte = body[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at + 1
        shift += 7
        if shift > 63:
            raise DatumError(f"{_NO_REQUEST}: a number has more than ten bytes")

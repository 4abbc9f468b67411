"""JSON that is counted before it is parsed: lists, objects, strings, numbers and depth."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, final

from ...errors import ServiceError, TooLargeError

__all__ = ["JsonBounds", "parse_json"]

_STEP: Final = 1 << 20  # bytes that are counted without letting other threads run
_LARGE: Final = 4 * _STEP  # bytes; what is smaller is always counted exactly
_QUOTES: Final = 6  # for each list or object; those of a datum have about 3.5
_QUOTE: Final = 0x22
# A string, also one that never ends, or a bracket.
_PART: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


@final
@dataclass(frozen=True)
class JsonBounds:
    """The most that a JSON body may hold.

    Args:
        bytes: of the body.
        values: of all kinds, keys included.
        containers: lists and objects.
        depth: of lists and objects in each other.
        flat: values in a row between two brackets.
    """

    bytes: int
    values: int
    containers: int
    depth: int = 64
    flat: int = 1 << 22


def parse_json(body: bytes, bounds: JsonBounds) -> Any:
    """Parse a body that is within bounds; may take a while, and lets other threads run after each object.

    Raises:
        TooLargeError: it is over one of the bounds; nothing was parsed.
        ServiceError: it is no JSON.
    """
    _check(body, bounds)
    try:
        return json.loads(body, object_hook=_same)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"malformed request: the body is no JSON ({error})") from error


def _same(content: dict[str, Any]) -> dict[str, Any]:
    """Return an object as it is: a function of Python's lets other threads run, which the parser alone does not."""
    return content


def _check(body: bytes, bounds: JsonBounds) -> None:
    _most(len(body), bounds.bytes, "bytes")
    commas = _counted_roughly(body, bounds)
    strings = containers = depth = after = 0
    for part in _PART.finditer(body):
        first, start = body[part.start()], part.start()
        if first == _QUOTE:  # what is in a string separates nothing
            strings += 1
            commas -= body.count(b",", start, part.end())
        elif first in b"[{":
            containers, depth = containers + 1, depth + 1
            _most(depth, bounds.depth, "lists and objects in each other")
            _most(containers, bounds.containers, "lists and objects")
        else:
            depth -= 1
        if start - after > bounds.flat:
            _most(body.count(b",", after, start), bounds.flat, "values in a row")
        after = part.end()
    _most(commas + containers + strings + 1, bounds.values, "values")


def _counted_roughly(body: bytes, bounds: JsonBounds) -> int:
    """Count commas; of a body that is large, refuse at once what would be too much if its strings held none of it."""
    commas = containers = quotes = 0
    for start in range(0, len(body), _STEP):
        counts = [body.count(sign, start, start + _STEP) for sign in (b",", b"[", b"{", b'"')]
        commas, containers, quotes = commas + counts[0], containers + counts[1] + counts[2], quotes + counts[3]
        if len(body) > _LARGE:
            _most(containers, bounds.containers, "lists and objects")
            _most(quotes, _QUOTES * bounds.containers, "quotation marks")
            _most(commas, bounds.values, "values")
    return commas


def _most(count: int, most: int, what: str) -> None:
    if count > most:
        raise TooLargeError(f"the body has more than {most} {what}, which is all that this server takes here")

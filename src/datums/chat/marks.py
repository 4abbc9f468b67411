"""Marks in the text of messages, by which one more rendering shows where each message lies.

A mark is one character of a private-use plane, which no template looks at. A rendering with marks counts only where it is,
without them, the plain rendering to the letter: a template that strips or tests a text may answer a marked one otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from .messages import REASONING_KEYS

__all__ = ["Marking", "Marks", "Places", "trailing_space", "without_trailing_space"]

_PLANES: Final = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))  # the supplementary private use areas
_PRIVATE: Final = re.compile(f"[{chr(_PLANES[0][0])}-{chr(_PLANES[1][1])}]")
_KINDS: Final = 3  # begin, end, tool call


@final
@dataclass(frozen=True)
class Marking:
    """Where marks are put.

    Attributes:
        within: inside the space around a text, so that a template may strip it; else at its very ends.
        begins: at the beginnings too, not at the ends alone.
    """

    within: bool
    begins: bool


@final
@dataclass(frozen=True)
class Marks:
    """The characters that mark the messages of one chat; its text has none of them.

    Attributes:
        first: code point of the first one.
        messages: how many messages can be marked.
    """

    first: int
    messages: int

    @classmethod
    def missing_in(cls, text: str, messages: int) -> Marks | None:
        """Return marks that are not in a text, or None where it uses the private planes up."""
        used = sorted({ord(character) for character in _PRIVATE.findall(text)})
        for start, stop in _PLANES:
            for code in (*(code for code in used if start <= code < stop), stop):
                if code - start >= _KINDS * messages:
                    return cls(start, messages)
                start = code + 1
        return None

    def put(
        self, messages: Sequence[Mapping[str, Any]], marking: Marking, only: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return copies of the messages with marks in their texts.

        Args:
            messages: as a template takes them.
            marking: where the marks are put.
            only: the messages that are marked; all by default.
        """
        marked = [dict(message) for message in messages]
        for i in range(len(messages)) if only is None else only:
            begin, end, call = (chr(self.first + _KINDS * i + kind) for kind in range(_KINDS))
            _mark_message(marked[i], begin, end, call, marking)
        return marked

    def places(self, marked: str) -> Places:
        """Return a text without its marks, and where they were."""
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        calls = set()
        pattern = re.compile(f"[{chr(self.first)}-{chr(self.first + _KINDS * self.messages - 1)}]")
        for before, found in enumerate(pattern.finditer(marked)):
            place = found.start() - before
            i, kind = divmod(ord(found.group()) - self.first, _KINDS)
            if kind == 0:
                begins.setdefault(i, place)
            elif kind == 1:
                ends[i] = place
            else:
                calls.add(i)
        return Places(self, pattern.sub("", marked), begins, ends, frozenset(calls))


@final
@dataclass(frozen=True)
class Places:
    """Where messages lie in a text, by their number: characters."""

    marks: Marks
    text: str
    begins: Mapping[int, int]
    ends: Mapping[int, int]
    calls: frozenset[int]  # the messages whose tool calls are there

    def tail(self, i: int) -> str | None:
        """Return what stands after message i."""
        return self.text[self.ends[i] :] if i in self.ends else None


def trailing_space(message: Mapping[str, Any]) -> str:
    """Return the white space at the end of a message's content."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = content[-1]["text"] if content else ""
    return content[len(content.rstrip()) :] if isinstance(content, str) else ""


def without_trailing_space(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message without the white space at the end of its content."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content.rstrip()}
    if content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"].rstrip()}]}
    return message


def _mark_message(message: dict[str, Any], begin: str, end: str, call: str, marking: Marking) -> None:
    for key in (*REASONING_KEYS, "content"):
        value = message.get(key)
        if isinstance(value, str) and (value or not message.get("tool_calls")):
            message[key] = _around(value, begin, end, marking)
        elif isinstance(value, (list, tuple)) and key == "content":
            message[key] = [{**part, "text": _around(part["text"], begin, end, marking)} for part in value]
    if message.get("tool_calls"):
        message["tool_calls"] = [_mark_call(each, end, call) for each in message["tool_calls"]]


def _around(text: str, begin: str, end: str, marking: Marking) -> str:
    first = begin if marking.begins else ""
    core = text.strip()
    if not marking.within:
        return first + text + end
    if not core:
        return text + end  # a template that strips it leaves the mark
    lead = len(text) - len(text.lstrip())
    return text[:lead] + first + core + end + text[lead + len(core) :]


def _mark_call(call: Any, end: str, name_mark: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return call
    marked = {**function, "name": function["name"] + name_mark}
    if function.get("arguments") is not None:
        marked["arguments"] = _end_leaves(function["arguments"], end)
    return {**call, "function": marked} if "function" in call else marked


def _end_leaves(value: Any, end: str) -> Any:
    if isinstance(value, str):
        return value + end
    if isinstance(value, Mapping):
        return {key: _end_leaves(each, end) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_end_leaves(each, end) for each in value]
    return value

"""Which characters of a rendered chat a sampler would have produced: from the end of its prompt to its stop token.

The beginning of a turn is where the prompt ends that a sampler is given: the messages before it, rendered with the generation
prompt. The end is its stop token, without what the template writes after that. Both are the same text at every turn of a kind,
so they are rendered once for each kind and looked for at the places that marks show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from ...errors import DatumError
from ..prefix import common_prefix
from .ending import TurnEnding, ending_of
from .locate import locate
from .marks import Marking, Marks, Places, trailing_space, without_trailing_space
from .messages import REASONING_KEYS, Chat
from .renderer import Renderer

__all__ = ["Span", "SpanFinder", "Spans"]

_Key: TypeAlias = tuple[Any, ...]


@final
@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``stop`` (excluded), trained with a weight."""

    start: int
    stop: int
    weight: float


Spans: TypeAlias = list[Span]


@final
@dataclass(frozen=True)
class _Prompt:
    """What stands after a message when an answer is asked for: ``tail``, of which ``own`` characters close the message."""

    tail: str
    own: int


class SpanFinder:
    """Finds the trained characters of chats; remembers what the template writes around turns of each kind.

    Args:
        renderer: of the tokenizer.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._render = renderer
        self._prompts: dict[_Key, _Prompt | None] = {}
        self._endings: dict[_Key, TurnEnding | None] = {}

    def find(self, chat: Chat, text: str) -> Spans:
        """Return the trained characters of a chat.

        Args:
            chat: prepared by the renderer.
            text: its rendering.

        Raises:
            DatumError: the template leaves a turn out, or writes it so that its characters cannot be told apart.
        """
        places = locate(self._render, chat, text)
        spans = []
        for i in chat.trained:
            start = self._start(chat, text, places, i)
            stop = self._stop(chat, text, places, i, start)
            spans.append(Span(start, stop, chat.weights[i]))
        return spans

    def _start(self, chat: Chat, text: str, places: Places | None, i: int) -> int:
        begin = None if places is None else places.begins.get(i)
        if i == 0:
            return self._first_start(text, begin)
        if places is not None and i - 1 in places.ends:
            key = (*_kind(chat, i - 1), chat.messages[i]["role"])
            if key not in self._prompts:
                self._prompts[key] = self._prompt(chat, places.marks, i)
            prompt = self._prompts[key]
            if prompt is not None:
                start = self._after(prompt, text, places.ends[i - 1], begin, trailing_space(chat.messages[i - 1]))
                if start is not None:
                    return start
        return self._start_by_prefix(chat, text, begin, i)

    def _first_start(self, text: str, begin: int | None) -> int:
        if begin is None:
            raise DatumError("message 0 is trained, but nothing shows where it begins; put a message before it")
        return begin

    def _prompt(self, chat: Chat, marks: Marks, i: int) -> _Prompt | None:
        """Return what stands after message i - 1 when message i is asked for."""
        before = self._marked_last(chat, marks, i - 1)
        own = marks.places(self._render(chat, before)).tail(i - 1)
        if own is None:
            return None
        asked = None
        if chat.messages[i]["role"] == "assistant":
            asked = marks.places(self._render(chat, before, prompt=True)).tail(i - 1)
        if asked is None or asked == own:  # the template has no generation prompt, or none after this message
            return _Prompt(own + self._header(chat, marks, i, before, own), len(own))
        return _Prompt(asked, common_prefix(own, asked))

    def _header(self, chat: Chat, marks: Marks, i: int, before: list[dict[str, Any]], own: str) -> str:
        """Return what a template without a generation prompt writes between a message and the content of an answer."""
        answer = {"role": chat.messages[i]["role"], "content": "answer"}
        answered = marks.put([*before, answer], Marking(within=False, begins=True), only=[i])
        try:
            places = marks.places(self._render(chat, answered))
        except DatumError:
            return ""
        between = places.text[places.ends.get(i - 1, 0) : places.begins.get(i, 0)]
        return between[len(own) :].rstrip(" ") if between.startswith(own) else ""

    def _after(self, prompt: _Prompt, text: str, end: int, begin: int | None, space: str) -> int | None:
        """Return where the prompt ends that stands after character ``end``, or None where it does not stand there."""
        place, matched = _aligned(prompt.tail, text, end, space)
        if matched == len(prompt.tail):
            return place + matched
        if begin is not None and matched > prompt.own and begin <= place + matched:
            return begin
        whole = self._whole_pieces(prompt.tail, matched)
        if whole <= prompt.own:
            return begin if matched >= prompt.own else None
        return place + whole

    def _whole_pieces(self, tail: str, length: int) -> int:
        """Return the end of the last token or word of a prompt that lies within its first characters."""
        ends = [found.end() for found in self._render.added_tokens.finditer(tail)]
        ends += [j + 1 for j, character in enumerate(tail) if character.isspace()]
        return max((end for end in ends if end <= length), default=0)

    def _start_by_prefix(self, chat: Chat, text: str, begin: int | None, i: int) -> int:
        before = self._render(chat, chat.messages[:i])
        asked = self._render(chat, chat.messages[:i], prompt=True)
        if chat.messages[i]["role"] != "assistant" or asked == before:
            if begin is not None:
                return begin
        elif text.startswith(before) or common_prefix(asked, text) > common_prefix(asked, before):
            return self._whole_prefix(asked, text, begin)
        if begin is not None and text.startswith(before):
            return begin
        raise _rewritten(i, before, text, common_prefix(before, text))

    def _whole_prefix(self, asked: str, text: str, begin: int | None) -> int:
        length = common_prefix(asked, text)
        if length == len(asked):
            return length
        if begin is not None and begin <= length:
            return begin
        return self._whole_pieces(asked, length)

    def _stop(self, chat: Chat, text: str, places: Places | None, i: int, start: int) -> int:
        known = places is not None and places.ends.get(i, -1) >= start
        end = places.ends[i] if places is not None and known else start
        if i == len(chat.messages) - 1:
            return end + self._ending(chat, i, text[end:]).sampled
        if not known or chat.messages[i].get("tool_calls"):  # what follows is not the same at every such turn
            return self._stop_by_own(chat, text, places, i, end, known)
        rest = text[end : places.begins.get(i + 1, places.ends.get(i + 1, len(text)))] if places else ""
        ending = self._known_ending(chat, places.marks, i) if places is not None else None
        sampled = None if ending is None else ending.find(rest, trailing_space(chat.messages[i]))
        if ending is None or sampled is None:
            return self._stop_by_own(chat, text, places, i, end, True)
        return end + sampled if ending.special else self._closed_by_next(text, end + sampled)

    def _closed_by_next(self, text: str, end: int) -> int:
        """Return the end of the next turn's first token, at which a turn without a stop token of its own is stopped."""
        following = self._render.special_tokens.match(text, end)
        begins_text = getattr(self._render.tokenizer, "bos_token", None)
        return end if following is None or following.group() == begins_text else following.end()

    def _known_ending(self, chat: Chat, marks: Marks, i: int) -> TurnEnding | None:
        key = _kind(chat, i)
        if key not in self._endings:
            self._endings[key] = self._own_ending(chat, marks, i)
        return self._endings[key]

    def _own_ending(self, chat: Chat, marks: Marks, i: int) -> TurnEnding | None:
        """Return how message i ends when it is the last one."""
        tail = self._own_tail(chat, marks, i)
        return None if tail is None else self._ending(chat, i, tail)

    def _ending(self, chat: Chat, i: int, tail: str) -> TurnEnding:
        return ending_of(tail, self._render.special_tokens, bool(chat.messages[i].get("tool_calls")))

    def _stop_by_own(self, chat: Chat, text: str, places: Places | None, i: int, end: int, known: bool) -> int:
        """Return where message i is over, by the rendering that stops there.

        ``end`` is the end of its content where that is ``known``, else the beginning of the turn.
        """
        tail = self._own_tail(chat, places.marks, i) if places is not None and known else None
        if tail is None:
            tail = self._tail_of_prefix(chat, text, i, end)
        end, shared = _aligned(tail, text, end, trailing_space(chat.messages[i]) if known else "")
        ending = self._ending(chat, i, tail)
        if ending.sampled <= shared:
            return end + ending.sampled if ending.special else self._closed_by_next(text, end + ending.sampled)
        if not known:
            raise _rewritten(i, tail, text[end:], shared)
        stops = [found.end() for found in self._render.special_tokens.finditer(tail)]
        return end + max((stop for stop in stops if stop <= shared), default=0)

    def _tail_of_prefix(self, chat: Chat, text: str, i: int, end: int) -> str:
        until = self._render(chat, chat.messages[: i + 1])
        shared = common_prefix(until, text)
        if shared >= end:
            return until[end:]
        raise _rewritten(i, until, text, shared)

    def _own_tail(self, chat: Chat, marks: Marks, i: int) -> str | None:
        return marks.places(self._render(chat, self._marked_last(chat, marks, i))).tail(i)

    def _marked_last(self, chat: Chat, marks: Marks, i: int) -> list[dict[str, Any]]:
        messages = (*chat.messages[:i], without_trailing_space(chat.messages[i]))
        return marks.put(messages, Marking(within=True, begins=False), only=[i])


def _rewritten(i: int, alone: str, followed: str, place: int) -> DatumError:
    return DatumError(
        f"message {i}: the chat template writes it, or what is before it, differently once other messages follow "
        f"({alone[place : place + 30]!r} becomes {followed[place : place + 30]!r}), so where its answer lies cannot be told; "
        "train the last turn only (turns='last'), give a template that marks what is generated ({% generation %}), or render "
        "the text yourself and use datum_from_spans"
    )


def _aligned(tail: str, text: str, end: int, space: str) -> tuple[int, int]:
    """Return where a tail is best found after a content, with its white space or stripped of it, and how much is there."""
    places = {end, end + len(space)} if text.startswith(space, end) else {end}
    shared = {place: common_prefix(tail, text[place : place + len(tail)]) for place in sorted(places)}
    best = max(shared, key=lambda place: shared[place])
    return best, shared[best]


def _kind(chat: Chat, i: int) -> _Key:
    message: Mapping[str, Any] = chat.messages[i]
    shape = (message["role"], type(message.get("content")), bool(message.get("tool_calls")))
    reasoning = any(message.get(key) for key in REASONING_KEYS)
    return (*shape, reasoning, chat.variant)

"""Reads rows of every format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ...errors import DatumError
from ..chat import Chat, ChatReader, read_chat
from ..chat.messages import Turns
from ..chat.roles import unusual_roles
from ..prefix import common_prefix
from .columns import RowKind
from .conversations import holds_null, is_chat, messages_of, tools_of
from .sources import RowSource, Source, whole_text
from .tokens import encoded_row

__all__ = ["ReadOptions", "RowReader"]


@final
@dataclass(frozen=True)
class ReadOptions:
    """What `from_rows` is told of chats and texts; see there."""

    train_on: str | Collection[str] = "assistant"
    turns: Turns = "all"
    tools: Sequence[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    append_eos: bool = True


class RowReader:
    """Reads rows with one tokenizer.

    Args:
        tokenizer: of transformers.
        options: what is trained of a chat, and whether texts are ended.

    Attributes:
        untrained_roles: roles beside those that nobody expects to be trained, of which turns were read and not trained.
        with_nulls: how many chats have tool calls or tools that hold None.
    """

    def __init__(self, tokenizer: Any, options: ReadOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._chats: ChatReader | None = None
        self.untrained_roles: dict[str, None] = {}
        self.with_nulls = 0
        self._end = _end_of_text(tokenizer) if options.append_eos and tokenizer is not None else ""

    def read(self, number: int, row: Mapping[str, Any], kind: RowKind) -> RowSource:
        """Return what is tokenized of a row.

        Raises:
            DatumError: the row is ambiguous, or is not what its columns promise.
        """
        if kind == "tokens":
            return RowSource(number, (Source(encoded=encoded_row(row)),))
        if self._tokenizer is None:
            raise DatumError(f"rows of kind {kind!r} need a tokenizer")
        if kind == "text":
            return RowSource(number, (self._text("", _text_of("text", row["text"])),))
        if kind == "preference":
            return self._pair(number, row)
        if kind == "messages":
            return RowSource(number, (self._chat(row, [], _messages(row)),))
        label = _label(row["label"]) if kind == "unpaired_preference" else None
        return RowSource(number, (self._answer(row, row["prompt"], "completion"),), label)

    def _pair(self, number: int, row: Mapping[str, Any]) -> RowSource:
        chat = is_chat("chosen", row["chosen"])
        if chat != is_chat("rejected", row["rejected"]):
            raise DatumError("one of chosen and rejected is text, the other a list of messages; give both in one form")
        prompt = row.get("prompt")
        if chat and isinstance(prompt, str):
            _check_repeated(prompt, row)
            prompt = None
        if prompt is not None:
            _check_texts_apart(prompt, row)
            return RowSource(number, tuple(self._answer(row, prompt, side) for side in ("chosen", "rejected")))
        if not chat:
            texts = (self._text("", _text_of(side, row[side])) for side in ("chosen", "rejected"))
            return RowSource(number, tuple(texts), shared_prompt=True)
        sides = [messages_of(side, row[side]) for side in ("chosen", "rejected")]
        shared = common_prefix(sides[0], sides[1])
        if shared == 0 or shared == max(map(len, sides)):
            raise DatumError(
                "chosen and rejected begin with no common message; give the prompt" if shared == 0 else _SAME
            )
        return RowSource(number, tuple(self._chat(row, side[:shared], side[shared:]) for side in sides))

    def _answer(self, row: Mapping[str, Any], prompt: Any, name: str) -> Source:
        chat, answered = is_chat("prompt", prompt), is_chat(name, row[name])
        if chat != answered:
            forms = ("text", "a list of messages")
            raise DatumError(
                f"prompt is {forms[chat]}, but {name} is {forms[answered]}: whether that text is a message or raw cannot be "
                "told; give both in one form"
            )
        if chat:
            return self._chat(row, *_apart(messages_of("prompt", prompt), messages_of(name, row[name]), name))
        for column in ("tools", "chat_template_kwargs"):
            if row.get(column):
                raise DatumError(f"column {column!r} is for chats, but prompt and {name} are text")
        return self._text(prompt, _text_of(name, row[name]))

    def _text(self, prompt: str, answer: str) -> Source:
        return whole_text(prompt, answer if answer.endswith(self._end) else answer + self._end)

    def _chat(self, row: Mapping[str, Any], prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> Source:
        for i, message in enumerate(prompt):
            if message.get("weight") or message.get("train"):
                raise DatumError(
                    f"prompt[{i}] asks to be trained, but a prompt is not; put it into the messages that follow"
                )
        if prompt and not answer:
            raise DatumError("there is no message after the prompt")
        options = self._options
        tools = tools_of(row.get("tools")) or options.tools
        arguments = {**(options.chat_template_kwargs or {}), **_arguments(row)}
        chat = read_chat([*prompt, *answer], options.train_on, tools, arguments)
        self.untrained_roles.update(dict.fromkeys(unusual_roles((m["role"] for m in chat.messages), options.train_on)))
        calls = [message["tool_calls"] for message in chat.messages if message.get("tool_calls")]
        self.with_nulls += holds_null([calls, tools or []])
        return self._rendered(chat.untrained_before(len(prompt)))

    def _rendered(self, chat: Chat) -> Source:
        if self._chats is None:
            self._chats = ChatReader(self._tokenizer)
        return Source(*self._chats.read(chat, self._options.turns))


_SAME = "chosen and rejected are the same; such a pair has no gradient"


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in ("messages", "conversations") if name in row]
    if len(names) == 2:
        raise DatumError("has both messages and conversations; keep one of them")
    return messages_of(names[0], row[names[0]])


def _check_repeated(prompt: str, row: Mapping[str, Any]) -> None:
    for side in ("chosen", "rejected"):
        asked = next((m.get("content") for m in messages_of(side, row[side]) if m.get("role") == "user"), None)
        if asked != prompt:
            raise DatumError(
                f"prompt is text, and {side} a list of messages whose first question is another; give the prompt as messages"
            )


def _apart(
    prompt: list[dict[str, Any]], answer: list[dict[str, Any]], name: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages of a prompt, and those after it; ones that hold the prompt too are refused."""
    if prompt and answer[: len(prompt)] == prompt:
        raise DatumError(
            f"{name} begins with the messages of prompt, which would stand there twice; keep them in one of both"
        )
    return prompt, answer


def _check_texts_apart(prompt: Any, row: Mapping[str, Any]) -> None:
    sides = row["chosen"], row["rejected"]
    if isinstance(prompt, str) and prompt and all(str(side).startswith(prompt) for side in sides):
        raise DatumError(
            "chosen and rejected begin with the prompt, which would stand there twice; drop the column 'prompt'"
        )


def _text_of(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DatumError(f"column {name!r} must hold text, got {type(value).__name__}")
    if not value:
        raise DatumError(f"column {name!r} is empty; there is nothing to train on")
    return value


def _label(value: Any) -> int:
    if value not in (True, False) or isinstance(value, str):
        raise DatumError(f"label must be true (desirable) or false (undesirable), got {value!r}")
    return int(value)


def _arguments(row: Mapping[str, Any]) -> Mapping[str, Any]:
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise DatumError(f"column 'chat_template_kwargs' must hold a dict, got {type(given).__name__}")
    return {key: value for key, value in given.items() if value is not None}


def _end_of_text(tokenizer: Any) -> str:
    """Return the end-of-text token, empty where the tokenizer has none or adds it by itself."""
    end = getattr(tokenizer, "eos_token", None)
    if not end or list(tokenizer("a")["input_ids"])[-1:] == [getattr(tokenizer, "eos_token_id", None)]:
        return ""
    return str(end)

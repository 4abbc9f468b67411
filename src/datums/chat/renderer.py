"""A tokenizer's chat template: renders chats, and says what it cannot render."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ...errors import DatumError, suggestion
from .messages import Chat

__all__ = ["Renderer"]

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_MARKED = (
    "{{% macro pullback_generated() %}}{begin}{{{{ caller() }}}}{end}{{% endmacro %}}\n"  # the line break is trimmed
)
_ARGUMENTS = ("chat_template", "documents", "sanitize_control_tokens", "tokenizer_kwargs")


class Renderer:
    """Renders chats with the template of a tokenizer.

    Args:
        tokenizer: has ``apply_chat_template``.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(getattr(tokenizer, "apply_chat_template", None)):
            raise DatumError(f"{type(tokenizer).__name__} has no apply_chat_template; chats need a tokenizer with one")
        self.tokenizer = tokenizer

    def __call__(self, chat: Chat, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        """Return the text of messages, with the tools and arguments of a chat.

        Args:
            chat: whose tools and arguments are used.
            messages: rendered in this order.
            prompt: end with the beginning of the assistant's next turn, as a sampler is given it.

        Raises:
            DatumError: the template refuses them.
        """
        options = dict(chat.arguments) if chat.tools is None else {"tools": chat.tools, **chat.arguments}
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt, **options
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise DatumError(f"the chat template failed: {type(error).__name__}: {error}") from error
        return str(text)

    def prepare(self, chat: Chat) -> tuple[Chat, str]:
        """Return the chat as the template takes it, and its text.

        Parts are joined where the template takes only text, and no content is an empty one where it needs some.

        Raises:
            DatumError: the template refuses it, ignores its tools or arguments, or quotes the arguments of a tool call.
        """
        self._check_arguments(chat)
        if any(isinstance(m.get("content"), (list, tuple)) for m in chat.messages) and not self._takes_parts:
            chat = replace(chat, messages=tuple(_joined(m) for m in chat.messages))
        try:
            text = self(chat, chat.messages)
        except DatumError:
            if all(m.get("content") is not None for m in chat.messages):
                raise
            chat = replace(chat, messages=tuple(_filled(m) for m in chat.messages))
            text = self(chat, chat.messages)
        _check_calls(chat.messages, text)
        if chat.tools is not None and text == self(replace(chat, tools=None), chat.messages):
            raise DatumError(
                "the chat template ignores tools: the chat reads the same without them; use one that renders tools"
            )
        return chat, text

    def template_of(self, chat: Chat) -> str:
        """Return the source of the template that renders a chat, empty where it is not known."""
        try:
            chosen = self.tokenizer.get_chat_template(chat.arguments.get("chat_template"), chat.tools)
        except (AttributeError, TypeError, ValueError):
            return ""
        return chosen if isinstance(chosen, str) else ""

    def marks_generation(self, chat: Chat) -> bool:
        """Whether the template itself says which text is generated, by ``{% generation %}``."""
        return bool(_GENERATION.search(self.template_of(chat)))

    def with_generated_blocks(self, chat: Chat, begin: str, end: str) -> str:
        """Return the text of a chat whose template marks what is generated, with each such block between two strings.

        transformers itself tells where they lie by the text that was written before them, which inside of a macro is not
        there yet: it marks other characters.
        """

        def called(tag: re.Match[str]) -> str:
            return f"{tag[1]}{'endcall' if tag[2] else 'call pullback_generated()'}{tag[3]}"

        source = _MARKED.format(begin=begin, end=end) + _GENERATION.sub(called, self.template_of(chat))
        return self(replace(chat, arguments={**chat.arguments, "chat_template": source}), chat.messages)

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens of the tokenizer."""
        found = {str(token) for token in getattr(self.tokenizer, "all_special_tokens", ())}
        for token in dict(getattr(self.tokenizer, "added_tokens_decoder", {})).values():
            if getattr(token, "special", False):
                found.add(str(token))
        return _alternatives(found)

    @cached_property
    def added_tokens(self) -> re.Pattern[str]:
        """Matches every added token, special or not."""
        added = {str(token) for token in dict(getattr(self.tokenizer, "added_tokens_decoder", {})).values()}
        return _alternatives(added | {str(token) for token in getattr(self.tokenizer, "all_special_tokens", ())})

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the text of parts is rendered, and not the list that holds it."""
        words = (("user", "question"), ("assistant", "answer"))
        parts = [{"role": role, "content": [{"type": "text", "text": word}]} for role, word in words]
        try:
            text = self(Chat((), ()), parts)
        except DatumError:
            return False
        return all(word in text for _, word in words) and not re.search(r"""['"]type['"]""", text)

    def _check_arguments(self, chat: Chat) -> None:
        source = self.template_of(chat)
        for key in chat.arguments if source else ():
            if key not in _ARGUMENTS and not re.search(rf"\b{re.escape(key)}\b", source):
                words = set(re.findall(r"[A-Za-z_]\w{2,}", source))
                raise DatumError(
                    f"the chat template has no argument {key!r}{suggestion(key, words)}; it would be ignored"
                )


def _alternatives(words: set[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, words), key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _check_calls(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Check that a tool call's arguments in JSON, as OpenAI's format has them, are not written as a quoted text."""
    for i, message in enumerate(messages):
        for given in map(_arguments_in_json, message.get("tool_calls") or ()):
            if given and any(json.dumps(given, ensure_ascii=ascii) in text for ascii in (False, True)):
                raise DatumError(
                    f"message {i}: the arguments of its tool call are text in JSON, which the chat template writes as a quoted "
                    f"text, {json.dumps(given)[:60]}; give them as a dict: json.loads(arguments)"
                )


def _arguments_in_json(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    given = function.get("arguments") if isinstance(function, Mapping) else None
    return given if isinstance(given, str) and given.lstrip().startswith("{") else ""


def _joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _filled(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return message if message.get("content") is not None else {**message, "content": ""}

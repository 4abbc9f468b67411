"""Datums from chats."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...errors import DatumError
from ..builders import datum_from_tokens_weights
from ..types import Datum
from .encoding import encode
from .generation import generated_spans
from .messages import Chat, Messages, Turns, read_chat
from .renderer import Renderer
from .spans import SpanFinder, Spans

__all__ = ["ChatReader", "datum_from_messages"]


class ChatReader:
    """Turns chats into texts and trained characters; what it learns of a template it keeps.

    Args:
        tokenizer: has ``apply_chat_template``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._render = Renderer(tokenizer)
        self._finder = SpanFinder(self._render)

    def read(self, chat: Chat, turns: Turns = "all") -> tuple[str, Spans]:
        """Return a chat's text and what is trained of it.

        Raises:
            DatumError: nothing is trained, or what is trained cannot be told.
        """
        if turns not in ("all", "last"):
            raise DatumError(f"turns must be 'all' or 'last', got {turns!r}")
        if not chat.trained:
            roles = ", ".join(message["role"] for message in chat.messages)
            raise DatumError(
                f"no message is trained (roles: {roles}; weights: {', '.join(f'{w:g}' for w in chat.weights)})"
            )
        chat, text = self._render.prepare(chat.last_only() if turns == "last" else chat)
        if self._render.marks_generation(chat):
            return text, generated_spans(self._render, chat, text)
        return text, self._finder.find(chat, text)


def datum_from_messages(
    tokenizer: Any,
    messages: Messages,
    train_on: str | Collection[str] = "assistant",
    *,
    turns: Turns = "all",
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
) -> Datum:
    """Build from chat messages, training on what a sampler draws: the turns of one role, their stop tokens included.

    The tokens are those of ``tokenizer.apply_chat_template(messages, tokenize=True)``. Not trained are the header of a turn,
    which a prompt gives, and what the template writes after a stop token. A token that holds the last character of a header
    and the first of an answer is trained.

    Args:
        tokenizer: has ``apply_chat_template``. Where its template has ``{% generation %}``, that says what is trained.
        messages: dicts with ``role`` and ``content``: text, parts of text, or None beside ``tool_calls``. ``weight`` (a number,
            0 or above) or ``train`` (a bool) says of one message whether it is trained.
        train_on: the role or roles whose turns are trained.
        turns: ``all`` or the ``last`` trained one only.
        tools: schemas or functions, for the template.
        chat_template_kwargs: further arguments of the template, e.g. ``{"enable_thinking": False}``.
        max_length: longest model input, tokens; what lies beyond is cut off on the right.

    Returns:
        A datum with ``target_tokens`` and ``weights``.

    Raises:
        DatumError: nothing is trained; the template refuses the messages, ignores tools, tool calls or an argument, or writes
            earlier turns differently when later ones follow, so that no characters belong to one turn.
    """
    chat = read_chat(messages, train_on, tools, chat_template_kwargs)
    encoded = encode(tokenizer, *ChatReader(tokenizer).read(chat, turns))
    return datum_from_tokens_weights(*encoded.tensors(), max_length)

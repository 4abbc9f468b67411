"""Find where messages lie in a rendered chat, by one rendering with marks where the first try fits."""

from __future__ import annotations

from ...errors import DatumError
from .marks import Marking, Marks, Places
from .messages import Chat
from .renderer import Renderer

__all__ = ["locate"]

_MARKINGS = (Marking(within=False, begins=True), Marking(within=True, begins=True), Marking(within=True, begins=False))


def locate(renderer: Renderer, chat: Chat, text: str) -> Places | None:
    """Return where the messages of a chat lie in its text, or None where no marked rendering is the plain one.

    Args:
        renderer: of the template.
        chat: prepared by it.
        text: its rendering.

    Raises:
        DatumError: tool calls, or the content of a trained message, are not rendered at all.
    """
    marks = Marks.missing_in(text, len(chat.messages))
    if marks is None:
        return None
    for marking in _MARKINGS:
        for only in (None, chat.trained):
            try:
                places = marks.places(renderer(chat, marks.put(chat.messages, marking, only)))
            except DatumError:  # the template tests the text that it is given
                continue
            if places.text == text:
                _check_calls(chat, places, only)
                _check_contents(chat, places)
                return places
    return None


def _check_contents(chat: Chat, places: Places) -> None:
    for i in chat.trained:
        content = chat.messages[i].get("content")
        if (
            content
            and i not in places.ends
            and i not in places.calls
            and (not isinstance(content, str) or content.strip())
        ):
            form = "parts of text" if isinstance(content, str) else "text"
            raise DatumError(
                f"message {i}: the chat template leaves its content out; use another template, or give the content as {form}"
            )


def _check_calls(chat: Chat, places: Places, only: list[int] | None) -> None:
    for i, message in enumerate(chat.messages):
        if message.get("tool_calls") and i not in places.calls and (only is None or i in only):
            raise DatumError(
                f"message {i}: the chat template leaves its tool calls out; use a template that renders tool calls, or write "
                "them into the content"
            )

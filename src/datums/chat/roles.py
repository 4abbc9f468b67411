"""The roles of messages: what data sets call them, and which are the assistant's under another name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Final

__all__ = ["ASSISTANT", "PROMPT_ROLES", "ROLE_OF", "is_assistant_in_other_words", "unusual_roles"]

ASSISTANT: Final = "assistant"
PROMPT_ROLES: Final = ("system", "user", "tool", "developer")  # nobody expects their turns to be trained
# what the sender of a message is called -> its role
ROLE_OF: Final = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "chatbot": ASSISTANT,
    "ai": ASSISTANT,
    "llm": ASSISTANT,
    "claude": ASSISTANT,
    "gemini": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CLOSE: Final = 0.8  # share of equal letters above which a word is a misspelling


@lru_cache(maxsize=256)
def is_assistant_in_other_words(role: str) -> bool:
    """Whether a role is probably meant to be ``assistant``: in capitals, misspelt, or by a name that data sets have for it."""
    plain = role.strip().lower()
    if role == ASSISTANT or plain in PROMPT_ROLES:
        return False
    return ROLE_OF.get(plain) == ASSISTANT or bool(difflib.get_close_matches(plain, [ASSISTANT], cutoff=_CLOSE))


def unusual_roles(roles: Iterable[str], trained: str | Collection[str]) -> list[str]:
    """Return the roles, each once, that are not trained and of which one might expect it."""
    usual = {*PROMPT_ROLES, *([trained] if isinstance(trained, str) else trained)}
    return [role for role in dict.fromkeys(roles) if role not in usual]

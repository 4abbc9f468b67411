"""From one row to what is tokenized of it: one text, or two for a pair, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from ..chat import Encoded, Span, Spans

__all__ = ["RowSource", "Source", "whole_text"]


@final
@dataclass(frozen=True)
class Source:
    """A sequence before it is tokenized, or after.

    Attributes:
        text: what is tokenized.
        spans: what of it is trained.
        special: whether the tokenizer adds its special tokens; a rendered chat has its own.
        encoded: the tokens, where they are known already.
    """

    text: str = ""
    spans: Spans = field(default_factory=list)
    special: bool = False
    encoded: Encoded | None = None


@final
@dataclass(frozen=True)
class RowSource:
    """What one row gives.

    Attributes:
        row: its number.
        sides: one sequence, or the chosen and the rejected one.
        label: 1 desirable, 0 undesirable, where the row says so.
        shared_prompt: the sides say nothing of a prompt: it is the tokens that they begin with alike.
    """

    row: int
    sides: tuple[Source, ...]
    label: int | None = None
    shared_prompt: bool = False


def whole_text(prompt: str, answer: str) -> Source:
    """Return the source of a text whose end is trained."""
    text = prompt + answer
    return Source(text, [Span(len(prompt), len(text), 1.0)], special=True)

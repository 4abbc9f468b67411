"""The tokens of a span where a tokenizer does not say which characters its tokens hold, as those in Python do not."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from ..prefix import common_prefix
from .spans import Span, Spans

__all__ = ["ranges_of", "token_ids"]


def ranges_of(tokenizer: Any, text: str, spans: Spans, ids: list[int]) -> list[tuple[int, int]]:
    """Return for each span the first of its tokens, and the first after them.

    Where the tokens decode to the text, so do the first of them to its beginning: how many characters those hold is counted.
    Elsewhere the text up to a place is tokenized alone, which may split it otherwise than the whole.

    Args:
        tokenizer: of transformers, or any that is called alike.
        text: what was tokenized.
        spans: of it.
        ids: its tokens, without any that were put around it.
    """
    exact = _decoded(tokenizer, ids) == text
    ranges = [(_by_decoding if exact else _by_prefix)(tokenizer, text, span, ids) for span in spans]
    return [
        (start, len(ids) if span.stop == len(text) else stop) for (start, stop), span in zip(ranges, spans, strict=True)
    ]


def token_ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Return the tokens of a text; with ``special`` those too that a tokenizer puts around it."""
    return [int(token) for token in tokenizer(text, add_special_tokens=special)["input_ids"]]


def _by_decoding(tokenizer: Any, text: str, span: Span, ids: list[int]) -> tuple[int, int]:
    def held(tokens: int) -> int:
        """How many characters the first tokens hold whole; a character of several tokens decodes when all are there."""
        return common_prefix(_decoded(tokenizer, ids[:tokens]) or "", text)

    counts = range(len(ids) + 1)
    start = bisect_left(counts, span.start, key=held)
    if held(start) > span.start:  # its last token holds the character before the span and the first of it
        start -= 1
    return start, bisect_left(counts, span.stop, key=held)


def _by_prefix(tokenizer: Any, text: str, span: Span, ids: list[int]) -> tuple[int, int]:
    start = common_prefix(token_ids(tokenizer, text[: span.start]), ids)
    until = token_ids(tokenizer, text[: span.stop])
    stop = common_prefix(until, ids)
    return start, stop + (stop < len(until))


def _decoded(tokenizer: Any, ids: list[int]) -> str | None:
    try:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    except (AttributeError, TypeError):  # a tokenizer that is only called alike
        return None

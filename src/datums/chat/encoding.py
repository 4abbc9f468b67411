"""From trained characters to trained tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from .spans import Span, Spans

__all__ = ["Encoded", "encode", "encode_all"]


@final
@dataclass(frozen=True)
class Encoded:
    """Tokens of a sequence and the weight of each as a target.

    Attributes:
        ids: T + 1 tokens.
        weights: as many.
        merged: how many trained tokens hold characters that are not trained too.
    """

    ids: list[int]
    weights: list[float]
    merged: int = 0


def encode(tokenizer: Any, text: str, spans: Spans, special: bool = False) -> Encoded:
    """Tokenize a text, and weight the tokens that hold a trained character.

    Args:
        tokenizer: of transformers, or any that is called alike.
        text: a rendered chat, or plain text.
        spans: what is trained of it, in order.
        special: add the special tokens that the tokenizer puts around a text.
    """
    if getattr(tokenizer, "is_fast", False):
        return encode_all(tokenizer, [text], [spans], special)[0]
    ids = _ids(tokenizer, text, special)
    ranges = [_range_by_prefix(tokenizer, text, span, ids, special) for span in spans]
    weights = [0.0] * len(ids)
    for (start, stop), span in zip(ranges, spans, strict=True):
        weights[start:stop] = [span.weight] * (stop - start)
    return Encoded(ids, weights)


def encode_all(tokenizer: Any, texts: Sequence[str], spans: Sequence[Spans], special: bool = False) -> list[Encoded]:
    """Tokenize many texts at once, as `encode` does."""
    if not getattr(tokenizer, "is_fast", False):
        return [encode(tokenizer, text, each, special) for text, each in zip(texts, spans, strict=True)]
    if not texts:
        return []
    batch = tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    together = zip(batch["input_ids"], batch["offset_mapping"], texts, spans, strict=True)
    return [_weighted(ids, offsets, len(text), each) for ids, offsets, text, each in together]


def _weighted(ids: list[int], offsets: Sequence[tuple[int, int]], length: int, spans: Spans) -> Encoded:
    starts, ends = _tiled(offsets)
    weights, merged = [0.0] * len(ids), 0
    for span in spans:
        first = bisect_right(ends, span.start)
        last = bisect_left(starts, span.stop)
        if span.stop == length:  # the end-of-text token that the tokenizer adds after it
            while last < len(ids) and ends[last] == length:
                last += 1
        if first < last:
            weights[first:last] = [span.weight] * (last - first)
            merged += (starts[first] < span.start) + (ends[last - 1] > span.stop)
    return Encoded(ids, weights, merged)


def _tiled(offsets: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return the first and the last character of each token, so that tokens leave no character between them.

    Tokenizers may leave white space out of a token's offsets, and give the tokens of one character the same ones.
    """
    starts, ends, reached = [], [], 0
    for start, end in offsets:
        if end == 0 and reached:  # a special token that is in no text
            start = end = reached
        starts.append(start if start < reached else reached)
        if end > reached:
            reached = end
        ends.append(reached)
    return starts, ends


def _range_by_prefix(tokenizer: Any, text: str, span: Span, ids: list[int], special: bool) -> tuple[int, int]:
    """Return the tokens of a span where a tokenizer does not say which characters its tokens hold."""
    start = _shared(_ids(tokenizer, text[: span.start], special), ids)
    if span.stop == len(text):
        return start, len(ids)
    until = _ids(tokenizer, text[: span.stop], special)
    stop = _shared(until, ids)
    return start, stop + (stop < len(until))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=special)["input_ids"]]

"""From trained characters to trained tokens."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ...errors import DatumError
from .decoding import ranges_of, token_ids
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

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the tokens, int64, and the weights, float32; torch itself reads a list eight times as slowly."""
        if not self.ids:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        ids, weights = array("q", self.ids), array("f", self.weights)
        return torch.frombuffer(ids, dtype=torch.int64), torch.frombuffer(weights, dtype=torch.float32)

    @property
    def first_trained(self) -> int:
        """The first token with a weight; the number of tokens where none has one."""
        return next((j for j, weight in enumerate(self.weights) if weight != 0), len(self.ids))


def encode(tokenizer: Any, text: str, spans: Spans, special: bool = False) -> Encoded:
    """Tokenize a text, and weight the tokens that hold a trained character.

    Args:
        tokenizer: of transformers, or any that is called alike.
        text: a rendered chat, or plain text.
        spans: what is trained of it, in order.
        special: add the special tokens that the tokenizer puts around a text, where the text has none of its own.
    """
    if getattr(tokenizer, "is_fast", False):
        return encode_all(tokenizer, [text], [spans], special)[0]
    ids = token_ids(tokenizer, text)
    weights = [0.0] * len(ids)
    for (start, stop), span in zip(ranges_of(tokenizer, text, spans, ids), spans, strict=True):
        weights[start:stop] = [span.weight] * (stop - start)
    return _put_around(tokenizer, text, Encoded(ids, weights)) if special else Encoded(ids, weights)


def encode_all(tokenizer: Any, texts: Sequence[str], spans: Sequence[Spans], special: bool = False) -> list[Encoded]:
    """Tokenize many texts at once, as `encode` does."""
    if not getattr(tokenizer, "is_fast", False):
        return [encode(tokenizer, text, each, special) for text, each in zip(texts, spans, strict=True)]
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    together = zip(batch["input_ids"], batch["offset_mapping"], texts, spans, strict=True)
    stripping = _stripping(tokenizer)
    encoded = [_weighted(ids, offsets, text, each, stripping) for ids, offsets, text, each in together]
    return _put_around_once(tokenizer, encoded) if special else encoded


def _put_around(tokenizer: Any, text: str, within: Encoded) -> Encoded:
    """Return a text with the special tokens that a tokenizer puts around it; those that end it are trained as its end is."""
    whole, count = token_ids(tokenizer, text, True), len(within.ids)
    place = next((j for j in range(len(whole) - count + 1) if whole[j : j + count] == within.ids), None)
    if place is None:
        raise DatumError(
            f"{type(tokenizer).__name__} tokenizes a text otherwise when it adds special tokens, so which tokens are those of "
            "the text cannot be told; add them to the text yourself, or give tokens"
        )
    end = within.weights[-1] if count else 0.0
    weights = [0.0] * place + within.weights + [end] * (len(whole) - place - count)
    return _put_around_once(tokenizer, [Encoded(whole, weights)])[0]


def _put_around_once(tokenizer: Any, texts: Sequence[Encoded]) -> list[Encoded]:
    """Return texts without the special tokens that a tokenizer has put around them where they have those already."""
    within, whole = (token_ids(tokenizer, "a", special) for special in (False, True))
    place = next((j for j in range(len(whole)) if whole[j : j + len(within)] == within), 0)
    begin, end = whole[:place], whole[place + len(within) :]
    made = []
    for text in texts:
        start = len(begin) if begin and text.ids[: 2 * len(begin)] == begin * 2 else 0
        stop = len(text.ids) - (len(end) if end and text.ids[-2 * len(end) :] == end * 2 else 0)
        made.append(replace(text, ids=text.ids[start:stop], weights=text.weights[start:stop]))
    return made


def _stripping(tokenizer: Any) -> frozenset[int]:
    """Return the added tokens that take the white space beside them, which is then in no token of its own."""
    added = dict(getattr(tokenizer, "added_tokens_decoder", {})).items()
    return frozenset(i for i, token in added if getattr(token, "lstrip", False) or getattr(token, "rstrip", False))


def _weighted(
    ids: list[int], offsets: Sequence[tuple[int, int]], text: str, spans: Spans, stripping: frozenset[int]
) -> Encoded:
    weights, merged = [0.0] * len(ids), 0

    def beside(token: int, span: Span) -> bool:
        """Whether a token has taken white space of the span, and nothing else of it."""
        start, stop = offsets[token]
        return ids[token] in stripping and text[max(start, span.start) : min(stop, span.stop)].isspace()

    within = len(ids)  # without special tokens that stand after the text, and in no part of it
    while within and offsets[within - 1] == (0, 0):
        within -= 1
    for span in spans:
        first = bisect_right(offsets, span.start, hi=within, key=_end)
        last = bisect_left(offsets, span.stop, hi=within, key=_start)
        if last < within and _reach(offsets, last) < span.stop:
            last += 1
        first += first < last and beside(first, span)
        last -= first < last and beside(last - 1, span)
        if first >= last:
            continue
        merged += (_reach(offsets, first) < span.start) + (offsets[last - 1][1] > span.stop)
        if span.stop == len(text):  # the end-of-text token that the tokenizer adds ends it
            last = len(ids)
        weights[first:last] = [span.weight] * (last - first)
    return Encoded(ids, weights, merged)


def _start(offset: tuple[int, int]) -> int:
    return offset[0]


def _end(offset: tuple[int, int]) -> int:
    return offset[1]


def _reach(offsets: Sequence[tuple[int, int]], token: int) -> int:
    """Return the first character of a token, with the white space before it that some tokenizers leave out of its offsets."""
    return min(offsets[token][0], offsets[token - 1][1] if token else 0)

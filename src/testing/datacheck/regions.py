"""Which tokens of a chat are the prompt, the header of an answer, the answer, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

__all__ = ["Regions"]


@final
@dataclass(frozen=True)
class Regions:
    """The tokens of a chat by what they are.

    Attributes:
        pieces: the text of each token.
        prompt: tokens of what anybody but the assistant said.
        headers: tokens that the template writes before an answer.
        answers: tokens of each answer.
        ends: the token that ends each answer; None where nothing follows.
    """

    pieces: tuple[str, ...]
    prompt: tuple[int, ...]
    headers: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    ends: tuple[int | None, ...]

    @classmethod
    def of(cls, tokenizer: Any, tokens: Sequence[int], messages: Sequence[Mapping[str, str]]) -> Regions:
        """Find what was said among the tokens, in order."""
        lengths = [len(tokenizer.decode(list(tokens[:j]))) for j in range(len(tokens) + 1)]
        text = tokenizer.decode(list(tokens))
        spans = [(a, max(a, b)) for a, b in pairwise(lengths)]
        prompt: list[int] = []
        headers: list[int] = []
        answers: list[tuple[int, ...]] = []
        ends: list[int | None] = []
        at, free = 0, 0  # the character, and the first token, after what has been found
        for message in messages:
            start = text.find(message["content"], at)
            if start < 0:
                if message["role"] == "assistant":
                    answers.append(())
                    ends.append(None)
                continue
            stop = start + len(message["content"])
            said = tuple(j for j, (a, b) in enumerate(spans) if a < stop and b > start)
            if message["role"] == "assistant":
                headers += range(free, said[0])
                answers.append(said)
                ends.append(_end(text, spans, said[-1] + 1, stop))
                free = said[-1] + 1 if ends[-1] is None else ends[-1] + 1
            else:
                prompt += said
                free = said[-1] + 1
            at = stop
        pieces = tuple(text[a:b] for a, b in spans)
        return cls(pieces, tuple(prompt), tuple(headers), tuple(answers), tuple(ends))

    def shown(self, token: int) -> str:
        """Return the text of a token, quoted."""
        return repr(self.pieces[token])

    def marked(self, trained: Sequence[bool]) -> str:
        """Return runs of tokens, one a line, ``*`` before those that are trained."""
        lines: list[tuple[bool, str]] = []
        for piece, is_trained in zip(self.pieces, trained, strict=True):
            if lines and lines[-1][0] == is_trained:
                lines[-1] = (is_trained, lines[-1][1] + piece)
            else:
                lines.append((is_trained, piece))
        return "\n".join(f"{'*' if is_trained else ' '} {run!r}" for is_trained, run in lines)


def _end(text: str, spans: Sequence[tuple[int, int]], first: int, stop: int) -> int | None:
    """Return the first token after an answer that is not blank."""
    for j in range(first, len(spans)):
        if text[max(spans[j][0], stop) : spans[j][1]].strip():
            return j
    return None

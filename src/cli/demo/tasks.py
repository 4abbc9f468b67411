"""Tasks: real text, pairs of answers, and rewards that can be verified. Fixed splits; nothing held out is trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data import topics
from typing import Generic, NamedTuple, TypeAlias, TypeVar, final

__all__ = [
    "Pair",
    "Reward",
    "Split",
    "Sum",
    "Text",
    "digit_reward",
    "documentation",
    "format_preferences",
    "preferences",
    "sum_prompts",
    "sum_reward",
]

Item = TypeVar("Item")


class Text(NamedTuple):
    """A prompt and what should follow."""

    prompt: str
    completion: str


class Pair(NamedTuple):
    """A prompt, a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str


class Sum(NamedTuple):
    """A question about two numbers."""

    x: int
    y: int


Reward: TypeAlias = Callable[[Sum, str, bool], float]


@final
@dataclass(frozen=True)
class Split(Generic[Item]):
    """Training items and held-out items."""

    train: Sequence[Item]
    held_out: Sequence[Item]


def documentation(seed: int, held_topics: int = 12, held_items: int = 36) -> Split[Text]:
    """Paragraphs of Python's own documentation; whole topics are held out."""
    rng = random.Random(seed)
    names = sorted(topics.topics)
    rng.shuffle(names)
    train = [text for name in names[held_topics:] for text in _paragraphs(name)]
    held = [text for name in names[:held_topics] for text in _paragraphs(name)]
    rng.shuffle(train)
    rng.shuffle(held)
    seen = {text.completion for text in train}
    return Split(train, [text for text in held if text.completion not in seen][:held_items])


def _paragraphs(name: str) -> list[Text]:
    found = (re.sub(r"\s+", " ", p).strip() for p in topics.topics[name].split("\n\n"))
    return [Text(f"Explain `{name}` in Python.", p) for p in found if len(p) > 120]


def preferences(seed: int, held_sums: int = 20) -> Split[Pair]:
    """Sums up to 20 + 20: the answer in tags is better than a wrong number in tags, and than a sentence."""
    rng = random.Random(seed)

    def pair(i: int, s: Sum) -> Pair:
        wrong = s.x + s.y + rng.choice([-3, -2, -1, 1, 2, 3])
        return _in_tags(s, _sentence(s) if i // 2 % 2 else f"<answer>{wrong}</answer>")

    return _pairs(rng, 20, held_sums, pair)


def format_preferences(seed: int, held_sums: int = 20) -> Split[Pair]:
    """Only the second kind: the answer in tags is better than a sentence. A model without arithmetic can learn it."""
    return _pairs(random.Random(seed), 20, held_sums, lambda _, s: _in_tags(s, _sentence(s)))


def _in_tags(s: Sum, rejected: str) -> Pair:
    return Pair(f"What is {s.x} + {s.y}?", f"<answer>{s.x + s.y}</answer>", rejected)


def _sentence(s: Sum) -> str:
    return f"{s.x} + {s.y} = {s.x + s.y}."


def _pairs(rng: random.Random, largest: int, held: int, pair: Callable[[int, Sum], Pair]) -> Split[Pair]:
    sums = _split_sums(rng, largest, held)
    held_out = [pair(i, s) for i, s in enumerate(sums.held_out)]
    train = [pair(i, s) for i, s in enumerate(sums.train)]
    rng.shuffle(train)
    return Split(train, held_out)


def sum_prompts(seed: int, held_sums: int = 12) -> Split[Sum]:
    """Sums of one-digit numbers."""
    rng = random.Random(seed)
    sums = _split_sums(rng, 9, held_sums)
    train = list(sums.train)
    rng.shuffle(train)
    return Split(train, sums.held_out)


def _split_sums(rng: random.Random, largest: int, held: int) -> Split[Sum]:
    """Split by the unordered pair, so that y + x is never trained on where x + y is held out."""
    sums = [(x, y) for x in range(1, largest + 1) for y in range(x, largest + 1)]
    rng.shuffle(sums)
    both = [[Sum(*s) for x, y in part for s in dict.fromkeys(((x, y), (y, x)))] for part in (sums[held:], sums[:held])]
    return Split(*both)


def sum_reward(question: Sum, completion: str, ended: bool) -> float:
    """1 for exactly ``<answer>N</answer>`` with the right N and nothing after, 0.3 for the format alone, else 0."""
    match = re.fullmatch(r"<answer>([0-9]+)</answer>", completion.strip())
    if match is None or not ended:
        return 0.0
    return 1.0 if int(match.group(1)) == question.x + question.y else 0.3


def digit_reward(question: Sum, completion: str, ended: bool) -> float:
    """Share of digits: a reward that even a random model earns a little of."""
    return sum(c in "0123456789" for c in completion) / max(1, len(completion))

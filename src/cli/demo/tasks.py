"""Tasks: real text, pairs of answers, and rewards that can be verified. Fixed splits; nothing held out is trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data import topics
from typing import Generic, NamedTuple, TypeVar, final

__all__ = ["Pair", "Split", "Text", "digit_reward", "documentation", "preferences", "sum_prompts", "sum_reward"]


T = TypeVar("T")
U = TypeVar("U")


class Text(NamedTuple):
    """A prompt and what should follow."""

    prompt: str
    completion: str


class Pair(NamedTuple):
    """A prompt, a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str


@final
@dataclass(frozen=True)
class Split(Generic[T]):
    """Training items and held-out items."""

    train: Sequence[T]
    held_out: Sequence[T]

    def map(self, make: Callable[[T], Sequence[U]]) -> Split[U]:
        """Return what is made of each item, one after another."""
        train, held_out = ([made for item in items for made in make(item)] for items in (self.train, self.held_out))
        return Split(train, held_out)


def documentation(seed: int, held_topics: int = 12, held_items: int = 36) -> Split[Text]:
    """Paragraphs of Python's own documentation; whole topics are held out."""
    rng = random.Random(seed)
    names = sorted(topics.topics)
    rng.shuffle(names)
    train = [text for name in names[held_topics:] for text in _paragraphs(name)]
    held_out = [text for name in names[:held_topics] for text in _paragraphs(name)]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return Split(train, held_out[:held_items])


def _paragraphs(name: str) -> list[Text]:
    paragraphs = (re.sub(r"\s+", " ", p).strip() for p in topics.topics[name].split("\n\n"))
    return [Text(f"Explain `{name}` in Python.", p) for p in paragraphs if len(p) > 120]


def preferences(seed: int, held_items: int = 40, *, wrong_numbers: bool = True) -> Split[Pair]:
    """Sums of numbers up to 20: the answer in tags is preferred to a sentence and (``wrong_numbers``) to a wrong one in tags.

    (x, y) and (y, x) are on the same side of the split.
    """
    rng = random.Random(seed)
    sums = [(x, y) for x in range(1, 21) for y in range(x, 21)]
    rng.shuffle(sums)
    cut = held_items // 2
    held_out, train = (
        [_pair(rng, x, y, wrong_numbers and i // 2 % 2 == 0) for i, (x, y) in enumerate(_both_orders(part))]
        for part in (sums[:cut], sums[cut:])
    )
    rng.shuffle(train)
    return Split(train, held_out)


def _both_orders(sums: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [pair for x, y in sums for pair in ((x, y), (y, x))]


def _pair(rng: random.Random, x: int, y: int, wrong_number: bool) -> Pair:
    good = f"<answer>{x + y}</answer>"
    wrong = x + y + rng.choice([-3, -2, -1, 1, 2, 3])
    bad = f"<answer>{wrong}</answer>" if wrong_number else f"{x} + {y} = {x + y}."
    return Pair(f"What is {x} + {y}?", good, bad)


class Sum(NamedTuple):
    """A question about two numbers."""

    x: int
    y: int


def sum_prompts(seed: int, held_items: int = 24) -> Split[Sum]:
    """Sums of one-digit numbers, split by the unordered pair."""
    rng = random.Random(seed)
    sums = [(x, y) for x in range(1, 10) for y in range(x, 10)]
    rng.shuffle(sums)
    cut = held_items // 2
    held_out, train = ([Sum(*s) for s in dict.fromkeys(_both_orders(part))] for part in (sums[:cut], sums[cut:]))
    rng.shuffle(train)
    return Split(train, held_out)


def sum_reward(question: Sum, completion: str, ended: bool) -> float:
    """1 for exactly ``<answer>N</answer>`` with the right N and nothing after, 0.3 for the format alone, else 0."""
    match = re.fullmatch(r"<answer>(\d+)</answer>", completion.strip())
    if match is None or not ended:
        return 0.0
    return 1.0 if int(match.group(1)) == question.x + question.y else 0.3


def digit_reward(question: Sum, completion: str, ended: bool) -> float:
    """Share of digits: a reward that even a random model earns a little of."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


Reward = Callable[[Sum, str, bool], float]

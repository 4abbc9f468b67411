"""The figure of the README: the error of a step's gradient by the number of calls, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, final

__all__ = ["Split", "draw"]


@final
class Split(NamedTuple):
    """A step in so many calls, and how far its gradient is from that of one call, relative to its length.

    Attributes:
        calls: how many.
        deferred: one division, by the tokens of all calls.
        added: each call divides by its own tokens, and the gradients are added up.
        averaged: the same, divided by the number of calls.
    """

    calls: int
    deferred: float
    added: float
    averaged: float


WIDTH: Final = 720
HEIGHT: Final = 300
LEFT, RIGHT, TOP, BOTTOM = 64, 474, 44, 252  # edges of the plot
HIGHEST: Final = 2  # power of 10
SERIES: Final = (
    ("added", "#b3261e", -14, -10, ("each call divides by its own tokens,", "and the trainer adds up")),
    ("averaged", "#b3701e", 12, 18, ("each call divides by its own tokens,", "and the trainer averages")),
    ("deferred", "#1f5fa8", -2, -10, ("pullback: one division,", "by the tokens of the whole step")),
)  # field, colour, place of its words, place of its number


def draw(splits: Sequence[Split], title: str) -> str:
    """Return the figure: calls of a step from left to right, relative errors upwards, in powers of 10."""
    lowest = math.floor(min(math.log10(error) for split in splits for error in split[1:] if error > 0)) - 1
    step = (RIGHT - LEFT) / len(splits)
    columns = [LEFT + step * (i + 0.5) for i in range(len(splits))]
    body = [_text(LEFT, 22, title, weight="bold"), *_axes(columns, splits, lowest)]
    for name, colour, words_at, number_at, words in SERIES:
        errors = [getattr(split, name) for split in splits]
        heights = [_height(error, lowest) for error in errors]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(columns, heights, strict=True))
        body.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
            for x, y in zip(columns, heights, strict=True)
        ]
        body.append(_text(columns[-1], heights[-1] + number_at, f"{errors[-1]:.2g}", colour, "middle", "bold"))
        body += [_text(RIGHT + 14, heights[-1] + words_at + 15 * i, each, colour) for i, each in enumerate(words)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>", ""])


def _axes(columns: Sequence[float], splits: Sequence[Split], lowest: int) -> Iterator[str]:
    for power in range(HIGHEST, lowest - 1, -2):
        y = _height(10.0**power, lowest)
        yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(LEFT - 8, y + 4, f"1e{power}" if power else "1", anchor="end")
    for x, split in zip(columns, splits, strict=True):
        yield _text(x, BOTTOM + 18, str(split.calls), anchor="middle")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 38, "calls of one optimizer step", anchor="middle")


def _height(error: float, lowest: int) -> float:
    power = math.log10(error) if error > 0 else lowest
    return TOP + (HIGHEST - power) / (HIGHEST - lowest) * (BOTTOM - TOP)


def _text(x: float, y: float, words: str, colour: str = "#333", anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-weight="{weight}">{words}</text>'

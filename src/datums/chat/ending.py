"""How a turn ends: what of the template's text after its content a sampler produces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

__all__ = ["TurnEnding", "ending_of"]


@final
@dataclass(frozen=True)
class TurnEnding:
    """The text after a turn's content.

    Attributes:
        sampled: how many of its characters a sampler produces: up to the end of its first special tokens; all of it where there
            are none.
        stops: what is looked for after other turns, most of it first: the special tokens; all of the text where there are none.
        special: whether they are special tokens.
    """

    sampled: int
    stops: tuple[str, ...]
    special: bool

    def find(self, rest: str, space: str) -> int | None:
        """Return where this ending is over in the text after another turn's content, or None where it is not there.

        Args:
            rest: the text after a content, up to the next message's.
            space: white space that the content ended with, which may have been stripped.
        """
        if self.special:
            places = [(rest.find(stop), stop) for stop in self.stops]
            return next((place + len(stop) for place, stop in places if place >= 0), None)
        for skipped in (len(space), 0):
            if rest[:skipped] == space[:skipped] and rest.startswith(self.stops[0], skipped):
                return skipped + len(self.stops[0])
        return None


def ending_of(tail: str, special_tokens: re.Pattern[str], calls: bool = False) -> TurnEnding:
    """Return the ending that a turn has when it is the last one.

    Args:
        tail: all that is rendered after its content.
        special_tokens: matches a special token.
        calls: the turn has tool calls, which may be closed by special tokens with text between them.
    """
    found = list(special_tokens.finditer(tail))
    if not found:
        return TurnEnding(len(tail), (tail,), False)
    run = [found[0]]
    for each in found[1:]:
        if not calls and each.start() != run[-1].end():
            break
        run.append(each)
    start = run[0].start()
    return TurnEnding(run[-1].end(), tuple(tail[start : each.end()] for each in reversed(run)), True)

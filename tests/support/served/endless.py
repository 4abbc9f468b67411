"""A work in slices that goes on until somebody ends it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import final

from pullback.service.durability.answers import Answer

__all__ = ["EndlessWork"]


@final
class EndlessWork:
    """To be submitted to a sequencer.

    Attributes:
        begun: set by the first slice.
        stopped: how many times it was ended.
    """

    def __init__(self) -> None:
        self.begun, self.stopped = threading.Event(), 0

    def __call__(self) -> Generator[None, None, Answer]:
        try:
            while True:
                self.begun.set()
                yield
        finally:
            self.stopped += 1

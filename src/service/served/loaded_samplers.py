"""Weights in memory to sample from: sessions on the same weights share them, and so are decoded together."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from .sampler import Sampler

__all__ = ["LoadedSamplers"]


@final
@dataclass(frozen=True, eq=False)
class _Loaded:
    owner: str
    sampler: Sampler


@final
class LoadedSamplers:
    """The weights used last, at most a number of them.

    Where there are too many, those go that were used longest ago of the owner who has most: nobody's weights make room for
    another who has more.

    Args:
        most: weights that are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._weights: OrderedDict[str, _Loaded] = OrderedDict()
        self._sessions: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def find(self, session: str) -> Sampler | None:
        """Return what a session samples from, if it is still in memory."""
        weights = self._sessions.get(session)
        if weights is None:
            return None
        self._weights.move_to_end(weights)
        return self._weights[weights].sampler

    def share(self, session: str, weights: str, owner: str, load: Callable[[], Sampler]) -> Sampler:
        """Return what a session samples from, from now on.

        Args:
            session: the sampling session.
            weights: what names these weights, and no others.
            owner: of the weights.
            load: makes the sampler, where none of these weights is in memory.
        """
        if weights not in self._weights:
            self._weights[weights] = _Loaded(owner, load())
        self._sessions[session] = weights
        self._weights.move_to_end(weights)
        while len(self._weights) > self._most:
            self._drop(self._oldest_of_most())
        return self._weights[weights].sampler

    def release(self, session: str) -> None:
        """Let go of a session, and of its weights if no other session has them."""
        weights = self._sessions.pop(session, None)
        if weights is not None and weights not in self._sessions.values():
            del self._weights[weights]

    def _oldest_of_most(self) -> str:
        counts = Counter(loaded.owner for loaded in self._weights.values())
        return next(key for key, loaded in self._weights.items() if counts[loaded.owner] == max(counts.values()))

    def _drop(self, weights: str) -> None:
        del self._weights[weights]
        self._sessions = {session: key for session, key in self._sessions.items() if key != weights}

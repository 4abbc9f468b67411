"""Graphs of forward passes, cached for a while: the backward of a custom loss then needs no second forward."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from ...backends.native import RetainedForward
from ...backends.native.execution.memory import graph_allowance
from ...datums.types import Datum

__all__ = ["GraphCache", "datum_keys"]

_CPU: Final = torch.device("cpu")
_TRIALS: Final = 8  # entries of a model before its hit rate means anything
_WORTHWHILE: Final = 0.25
_PROBE_EVERY: Final = 16  # a model whose entries go unused is tried again now and then


def datum_keys(data: Sequence[Datum]) -> list[str]:
    """Name each datum by its tokens and targets, which are all that a forward depends on."""
    keys = []
    for datum in data:
        digest = hashlib.sha256()
        for tensor in (datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


@dataclass(eq=False)
class _Entry:
    model: str
    keys: list[str]
    retained: RetainedForward
    until: float


@dataclass
class _Record:
    """How often a model's entries were used."""

    calls: int = 0
    stored: int = 0
    used: int = 0


@final
class GraphCache:
    """Forward passes with their graphs, bounded by bytes and time, and found by model and datums; for the worker thread alone.

    Args:
        max_bytes: that all graphs may hold together; None: each may take half of what is free when it is made.
        seconds: that one is kept.
        device: where the graphs are.
        clock: in seconds.
    """

    def __init__(
        self,
        max_bytes: float | None,
        seconds: float,
        device: torch.device = _CPU,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes, self._seconds, self._device, self._clock = max_bytes, seconds, device, clock
        self._entries: list[_Entry] = []
        self._records: dict[str, _Record] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the graphs hold."""
        return sum(entry.retained.bytes for entry in self._entries)

    @property
    def budget(self) -> float:
        """Memory budget of the next graphs, bytes."""
        self.sweep()
        if self._max_bytes is None:
            return graph_allowance(self._device)
        return self._max_bytes - self.bytes

    def is_worthwhile(self, model: str) -> bool:
        """Whether the next forward of this model should be cached: its entries are used often enough, or a trial is due."""
        record = self._records.setdefault(model, _Record())
        record.calls += 1
        if record.stored < _TRIALS or record.used >= _WORTHWHILE * record.stored:
            return True
        return record.calls % _PROBE_EVERY == 0

    def add(self, model: str, keys: list[str], retained: RetainedForward) -> None:
        """Add a forward pass."""
        self._records.setdefault(model, _Record()).stored += 1
        self._entries.append(_Entry(model, keys, retained, self._clock() + self._seconds))

    def take(self, model: str, keys: Sequence[str]) -> dict[RetainedForward, list[int]]:
        """Remove and return the forward passes all of whose datums are among these, and say which datum is which."""
        self.sweep()
        free: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            free.setdefault(key, []).append(i)
        matches: dict[RetainedForward, list[int]] = {}
        for entry in [entry for entry in self._entries if entry.model == model]:
            if all(len(free.get(key, ())) >= entry.keys.count(key) for key in set(entry.keys)):
                matches[entry.retained] = [free[key].pop(0) for key in entry.keys]
                self._entries.remove(entry)
                self._records[model].used += 1
        return matches

    def drop(self, model: str) -> None:
        """Remove a model's entries: its weights have changed, or it is gone."""
        self._entries = [entry for entry in self._entries if entry.model != model]

    def forget(self, model: str) -> None:
        """Forget a model altogether."""
        self.drop(model)
        self._records.pop(model, None)

    def sweep(self) -> None:
        """Remove what is too old."""
        now = self._clock()
        self._entries = [entry for entry in self._entries if entry.until > now]

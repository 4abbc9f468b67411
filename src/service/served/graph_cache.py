"""Graph leases: the forward of a custom loss is kept for a while, so that its backward needs no second one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch

from ...backends.native import HeldForward
from ...backends.native.execution.memory import graph_allowance
from ...datums.types import Datum

__all__ = ["Leases", "datum_keys"]

_CPU: Final = torch.device("cpu")
_TRIALS: Final = 8  # leases of a model before its hit rate means anything
_WORTH: Final = 0.25
_PROBE_EVERY: Final = 16  # a model whose leases go unused is tried again now and then


def datum_keys(data: Sequence[Datum]) -> list[str]:
    """Name each datum by its tokens and targets, which are all that a forward depends on."""
    found = []
    for datum in data:
        digest = hashlib.sha256()
        for tensor in (datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


@dataclass(eq=False)
class _Lease:
    model: str
    keys: list[str]
    held: HeldForward
    until: float


@dataclass
class _Record:
    """How often a model's leases were used."""

    calls: int = 0
    kept: int = 0
    used: int = 0


@final
class Leases:
    """Held forwards, bounded by bytes and time; found by model and datums. Used by the worker thread alone.

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
        self._leases: list[_Lease] = []
        self._records: dict[str, _Record] = {}

    @property
    def bytes(self) -> int:
        """That the graphs hold."""
        return sum(lease.held.bytes for lease in self._leases)

    @property
    def room(self) -> float:
        """Bytes that the next graphs may hold."""
        self.sweep()
        if self._max_bytes is None:
            return graph_allowance(self._device)
        return self._max_bytes - self.bytes

    def worth(self, model: str) -> bool:
        """Whether the next forward of this model should be kept: its leases have been used often enough, or are tried."""
        record = self._records.setdefault(model, _Record())
        record.calls += 1
        if record.kept < _TRIALS or record.used >= _WORTH * record.kept:
            return True
        return record.calls % _PROBE_EVERY == 0

    def keep(self, model: str, keys: list[str], held: HeldForward) -> None:
        """Keep a forward."""
        self._records.setdefault(model, _Record()).kept += 1
        self._leases.append(_Lease(model, keys, held, self._clock() + self._seconds))

    def take(self, model: str, keys: Sequence[str]) -> dict[HeldForward, list[int]]:
        """Hand out the forwards of which every datum is among these; say which datum is which."""
        self.sweep()
        free: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            free.setdefault(key, []).append(i)
        found: dict[HeldForward, list[int]] = {}
        for lease in [one for one in self._leases if one.model == model]:
            if all(len(free.get(key, ())) >= lease.keys.count(key) for key in set(lease.keys)):
                found[lease.held] = [free[key].pop(0) for key in lease.keys]
                self._leases.remove(lease)
                self._records[model].used += 1
        return found

    def drop(self, model: str) -> None:
        """Let go of a model's forwards: its weights have changed, or it is gone."""
        self._leases = [lease for lease in self._leases if lease.model != model]

    def forget(self, model: str) -> None:
        """Forget a model altogether."""
        self.drop(model)
        self._records.pop(model, None)

    def sweep(self) -> None:
        """Let go of what is too old."""
        now = self._clock()
        self._leases = [lease for lease in self._leases if lease.until > now]

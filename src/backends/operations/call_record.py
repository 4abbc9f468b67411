"""One gradient call since the last optimizer step: what it is divided by, what it said of the step, and how it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from ..types import LedgerEntry
from .futures import Outcome, State

__all__ = ["CallRecord"]


@final
@dataclass(frozen=True)
class CallRecord:
    """What every total of an accumulation, and every refusal, is derived from.

    Attributes:
        entry: what `optim_step` reports of it.
        declared: the normalisation that its loss declares (None: a mean; ``function``: unknown).
        described: the loss with its hyperparameters; empty for a function.
        counts: totals of the step that it has given, by denominator.
        groups: ids of its prompt groups, where the loss takes a mean over groups.
        mean: its loss is to be divided, by whomever; not by ``counts``, which divide at once.
        by_name: its loss is evaluated elsewhere.
        outcome: how it ends elsewhere; None: it has been accepted.
    """

    entry: LedgerEntry
    declared: str | None
    described: str = ""
    counts: Mapping[str, float] = field(default_factory=dict)
    groups: frozenset[int] = frozenset()
    mean: bool = False
    by_name: bool = False
    outcome: Outcome | None = None

    @property
    def loss(self) -> str:
        """Name of the loss or function."""
        return self.entry.loss

    @property
    def waits(self) -> bool:
        """Whether the step is to divide it."""
        return self.entry.denominator != "none"

    @property
    def state(self) -> State:
        """How it has ended, as far as anybody here has learned."""
        return "accepted" if self.outcome is None else self.outcome.state

    @property
    def error(self) -> BaseException | None:
        """Why it has failed, or may have; None where no failure has been learned of."""
        ended = self.outcome is not None and self.outcome.state != "pending"
        return self.outcome.settle() if self.outcome is not None and ended else None

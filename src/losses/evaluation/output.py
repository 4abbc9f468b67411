"""LossOutput: a loss's value, its undivided parts, and what is computed only when it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch import Tensor

from ...errors import MixedDenominatorsError
from ..aggregation import Denominator
from ..batch.problems import Problem, raise_first
from .metrics import Metric

__all__ = ["LossOutput", "Part"]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """One term, reduced but not divided: ``numerator / count`` is its share of the loss.

    Attributes:
        name: the term's.
        numerator: fp32 or better, 0-d. That of a sum of one term is the loss itself.
        denominator: what is counted.
        count: how many of it there are, in the batch or where ``counts`` were given in the step; 0-d on the log-probs'
            device, or a float where shapes tell. It belongs to the batch: add ranks up in a copy of it.
        own: how many there are in the batch; absent: ``count``.
    """

    name: str
    numerator: Tensor
    denominator: Denominator
    count: Tensor | float
    own: Tensor | float | None = None

    def divides_as(self, other: Part) -> bool:
        """Return whether one division serves both parts."""
        # The count of one denominator is one tensor; another tensor counts other tokens.
        same = self.count is other.count or (isinstance(self.count, float) and self.count == other.count)
        return self.denominator == other.denominator and same


@final
@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss, with everything that a trainer may want beside its value. Nothing in it has been read from a device.

    Attributes:
        loss: scalar; differentiable with respect to the batch's log-probs. Exactly 0 (and connected) if `empty`; NaN if
            the data have a problem that could not be looked at yet.
        parts: each term's numerator and denominator, for trainers that divide once, later.
        problems: what may be wrong with the data; see `check`.
    """

    loss: Tensor
    parts: tuple[Part, ...]
    problems: tuple[Problem, ...]
    _values: Callable[[], Mapping[str, Tensor]]
    _metrics: Callable[[], Mapping[str, Metric]]
    _wrong_values: Callable[[], Problem]

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """Unreduced values per term, detached; computed at the first reading."""
        return self._values()

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """What to log, computed at the first reading, in one transfer; combine them with `combine_metrics`."""
        return self._metrics()

    @property
    def empty(self) -> bool:
        """True if a denominator is zero, i.e. nothing is trained. Reads the device."""
        return any(float(part.count) == 0 for part in self.parts)

    def check(self) -> None:
        """Look for problems that `Loss.evaluate` could not see on a device: one transfer where all is well.

        Raises:
            PullbackError: says what is wrong with the data; the loss is NaN, or was computed from what is refused.
        """
        raise_first((*self.problems, self._wrong_values()))

    def deferred(self) -> Part:
        """Return the sum of all parts, to be divided later by one total count.

        Raises:
            MixedDenominatorsError: the terms have different denominators.
        """
        first, *others = self.parts
        for part in others:
            if not part.divides_as(first):
                raise MixedDenominatorsError(
                    f"term {first.name!r} is divided by {_words(first)} but {part.name!r} by {_words(part)}: one deferred "
                    "division cannot serve both; give counts={...} with the totals of the whole step"
                )
        return Part("loss", sum((p.numerator for p in others), first.numerator), first.denominator, first.count)


def _words(part: Part) -> str:
    return f"{part.denominator} ({float(part.count):g})"

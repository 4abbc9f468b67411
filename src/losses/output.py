"""LossOutput: a loss's value, its undivided parts, and metrics that are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

from torch import Tensor

from ..errors import MixedDenominatorsError
from .metrics import Metric
from .terms import Part

__all__ = ["LossOutput"]


@final
@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss, with everything that a trainer may want beside its value.

    Attributes:
        loss: scalar; differentiable with respect to the batch's log-probs. Exactly 0 (and connected) if ``empty``.
        parts: each term's numerator and denominator, for trainers that divide once, later.
        values: unreduced values per term, detached.
        compute_metrics: what `metrics` calls, once.
        empty: True if a denominator is zero, i.e. nothing is trained.
    """

    loss: Tensor
    parts: tuple[Part, ...]
    values: Mapping[str, Tensor]
    compute_metrics: Callable[[], Mapping[str, Metric]] = field(default=dict, repr=False)
    empty: bool = False

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """What to log, computed at the first reading; combine them with `combine_metrics`."""
        return self.compute_metrics()

    def deferred(self) -> Part:
        """Return the sum of all parts, to be divided later by one total count.

        Raises:
            MixedDenominatorsError: the terms have different denominators.
        """
        first, *others = self.parts
        for part in others:
            if (part.denominator, part.count) != (first.denominator, first.count):
                raise MixedDenominatorsError(
                    f"term {first.name!r} is divided by {first.denominator} ({first.count:g}) but {part.name!r} by "
                    f"{part.denominator} ({part.count:g}): one deferred division cannot serve both; give counts={{...}} "
                    "with the totals of the whole step"
                )
        return Part("loss", sum((p.numerator for p in others), first.numerator), first.denominator, first.count)

"""Metrics that combine exactly over calls, micro-batches and ranks: numerator, denominator, reduction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

__all__ = ["Metric", "Metrics", "combine_metrics", "maximum", "mean", "minimum", "total", "wire_metrics"]

Reduction = Literal["mean", "sum", "min", "max"]


@final
@dataclass(frozen=True)
class Metric:
    """A number that can be combined with others of its name.

    ``mean`` is numerator / denominator and combines by adding both; the other reductions use the numerator alone.
    """

    numerator: float
    denominator: float
    reduction: Reduction

    @property
    def value(self) -> float:
        """The number to show; NaN for the mean of nothing."""
        if self.reduction != "mean":
            return self.numerator
        return self.numerator / self.denominator if self.denominator else math.nan

    def __add__(self, other: Metric) -> Metric:
        if other.reduction != self.reduction:
            raise ValueError(f"cannot combine a {self.reduction} with a {other.reduction}")
        match self.reduction:
            case "min":
                return Metric(min(self.numerator, other.numerator), 1.0, "min")
            case "max":
                return Metric(max(self.numerator, other.numerator), 1.0, "max")
            case _:
                added = self.numerator + other.numerator, self.denominator + other.denominator
                return Metric(*added, self.reduction)


Metrics = Mapping[str, Metric]


def mean(values: Tensor, where: Tensor | None = None) -> Metric:
    """Return the mean of ``values`` over the True entries of ``where`` (all, if absent)."""
    kept = values.detach() if where is None else values.detach()[where]
    return Metric(float(kept.double().sum()), float(kept.numel()), "mean")


def total(value: Tensor | float) -> Metric:
    """Return the sum of ``value``."""
    amount = float(value.detach().double().sum()) if isinstance(value, Tensor) else value
    return Metric(amount, 1.0, "sum")


def maximum(values: Tensor, where: Tensor | None = None) -> Metric:
    """Return the largest of ``values``; minus infinity of nothing."""
    kept = values.detach() if where is None else values.detach()[where]
    return Metric(float(kept.max()) if kept.numel() else -math.inf, 1.0, "max")


def minimum(values: Tensor, where: Tensor | None = None) -> Metric:
    """Return the smallest of ``values``; infinity of nothing."""
    kept = values.detach() if where is None else values.detach()[where]
    return Metric(float(kept.min()) if kept.numel() else math.inf, 1.0, "min")


def combine_metrics(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Combine the metrics of several calls exactly."""
    combined: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            combined[name] = combined[name] + metric if name in combined else metric
    return combined


def wire_metrics(metrics: Metrics) -> dict[str, float]:
    """Return ``{"name:reduction": value}``, the form every Tinker-shaped client understands."""
    return {f"{name}:{metric.reduction}": metric.value for name, metric in metrics.items()}

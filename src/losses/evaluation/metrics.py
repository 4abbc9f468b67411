"""Metrics that combine exactly over calls, micro-batches and ranks: numerator, denominator, reduction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from ..batch.selection import readable

__all__ = ["DeferredMetric", "Metric", "Metrics", "combine_metrics", "maximum", "mean", "read", "total", "wire_metrics"]

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


class DeferredMetric(NamedTuple):
    """A metric whose numbers may still be on a device, 0-d; see `read`."""

    numerator: Tensor | float
    denominator: Tensor | float
    reduction: Reduction


def mean(values: Tensor, count: Tensor | float | None = None) -> DeferredMetric:
    """Return the mean of ``values``: of all, or of ``count`` of them where the others are 0."""
    return DeferredMetric(values.sum(), float(values.numel()) if count is None else count, "mean")


def total(value: Tensor | float) -> DeferredMetric:
    """Return the sum of ``value``."""
    return DeferredMetric(value.sum() if isinstance(value, Tensor) and value.dim() else value, 1.0, "sum")


def maximum(values: Tensor, count: Tensor) -> DeferredMetric:
    """Return the largest of ``values``, at least 0; minus infinity where ``count`` is 0."""
    largest = values.amax() if values.numel() else values.new_zeros(())
    return DeferredMetric(torch.where(count > 0, largest, -math.inf), 1.0, "max")


def read(metrics: Mapping[str, DeferredMetric | Metric]) -> dict[str, Metric]:
    """Return metrics as numbers, brought over in one transfer."""
    tensors = [
        x
        for metric in metrics.values()
        if isinstance(metric, DeferredMetric)
        for x in metric[:2]
        if isinstance(x, Tensor)
    ]
    if tensors and readable(tensors[0]):
        numbers = iter([x.item() for x in tensors])
    else:
        numbers = iter(torch.stack([x.detach().double() for x in tensors]).tolist() if tensors else [])
    found = {}
    for name, metric in metrics.items():
        if isinstance(metric, Metric):
            found[name] = metric
            continue
        top, bottom = (float(next(numbers)) if isinstance(x, Tensor) else float(x) for x in metric[:2])
        found[name] = Metric(top, bottom, metric.reduction)
    return found


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

"""Two numbers for every token, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ...datums.types import Datum

__all__ = ["Pairs", "cosine_of", "counts_of", "flat", "named_factor", "relative_difference"]


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """What two backends say of the same tokens.

    Args:
        a, b: one tensor per datum, [T] or [T, K], of equal shapes.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]

    @cached_property
    def flat_a(self) -> Tensor:
        """All numbers of a, fp64."""
        return flat(self.a)

    @cached_property
    def flat_b(self) -> Tensor:
        """All numbers of b, fp64."""
        return flat(self.b)

    @cached_property
    def by_token(self) -> list[Tensor]:
        """Absolute difference of each token, [T] per datum; the largest of its candidates, infinite where it is NaN."""
        apart = [(x.double() - y.double()).abs().nan_to_num(nan=math.inf) for x, y in zip(self.a, self.b, strict=True)]
        return [d if d.dim() == 1 else d.amax(-1) for d in apart]

    @property
    def largest(self) -> float:
        """Of the differences."""
        return float(torch.cat(self.by_token).max())

    @property
    def mean(self) -> float:
        """Of the differences."""
        return float(torch.cat(self.by_token).mean())

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return bool(self.flat_a.isfinite().all() and self.flat_b.isfinite().all())

    @property
    def relative(self) -> float:
        """Size of the difference over that of the larger side; 0 where both are 0."""
        return relative_difference(self.flat_a, self.flat_b)

    @property
    def cosine(self) -> float:
        """Of the angle between the two sides."""
        return cosine_of(self.flat_a, self.flat_b)

    @property
    def factor(self) -> float:
        """The number k for which k a is nearest to b; NaN where a is 0."""
        return float(self.flat_a @ self.flat_b) / float(self.flat_a.square().sum() or math.nan)

    def is_multiple(self, tolerance: float) -> bool:
        """Return whether b is a times one number, and that number is not 1."""
        k = self.factor
        close = relative_difference(k * self.flat_a, self.flat_b) <= tolerance
        return math.isfinite(k) and abs(k) > 1e-12 and abs(k - 1) > tolerance and close

    def beyond(self, limit: float) -> list[Tensor]:
        """Return which tokens differ by more, bool [T] per datum."""
        return [d > limit for d in self.by_token]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ``||a - b|| / max(||a||, ||b||)``; 0 where both are 0, infinity where a number is not finite."""
    size = max(float(a.norm()), float(b.norm()))
    found = float((a - b).norm()) / size if size else 0.0
    return found if math.isfinite(found) else math.inf


def cosine_of(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two vectors; 1 where both are 0, 0 where one is."""
    sizes = float(a.norm()), float(b.norm())
    if not all(sizes):
        return float(sizes[0] == sizes[1])
    return float(a @ b) / (sizes[0] * sizes[1])


def counts_of(data: Sequence[Datum]) -> Mapping[str, float]:
    """Return what a loss may have been divided by."""
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in data if "weights" in d.loss_fn_inputs]
    lengths = sum(len(d.model_input) for d in data)
    groups = {int(d.loss_fn_inputs["group_id"].to_torch().flatten()[0]) for d in data if "group_id" in d.loss_fn_inputs}
    trained = sum(int((w != 0).sum()) for w in weights) if len(weights) == len(data) else lengths
    found = {"trained tokens": float(trained), "tokens": float(lengths), "sequences": float(len(data))}
    if weights:
        found["the sum of the weights"] = float(sum(float(w.sum()) for w in weights))
    return found | {"pairs": len(data) / 2} | ({"groups": float(len(groups))} if groups else {})


def named_factor(k: float, counts: Mapping[str, float], tolerance: float = 1e-2) -> str:
    """Return in words what a factor between b and a may come from."""
    if abs(k + 1) <= tolerance:
        return "the sign"
    for name, count in counts.items():
        for divides, other, ratio in (("b", "a", k * count), ("a", "b", count / k)):
            if count != 1 and abs(ratio - 1) <= tolerance:
                what = name if name.startswith("the") else f"the number of {name}"
                return f"{divides} divides by {what} ({count:g}), and {other} does not"
    for (one, n), (two, m) in ((x, y) for x in counts.items() for y in counts.items() if x[1] != y[1]):
        if abs(k * n / m - 1) <= tolerance:
            return f"b divides by {one} ({n:g}) where a divides by {two} ({m:g})"
    return "a normalisation, or a coefficient of the loss"


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all numbers end to end, fp64, on the CPU."""
    return torch.cat([x.detach().double().cpu().reshape(-1) for x in tensors])

"""One exhibit of the bug museum, of whatever kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

__all__ = ["Exhibit", "Kind", "clean", "masked_mean"]

Kind = Literal["loss", "data", "model", "backend"]


@final
@dataclass(frozen=True)
class Exhibit:
    """A defect that this field has had, in a few lines.

    Attributes:
        name: what it is called here.
        source: where it was seen: ``owner/repository#thread`` and the year where that is known, or what kind of code has it.
        harm: what it did to those who trained with it, as one sentence.
        broken: the piece with the defect: a loss, a builder of datums, a function that returns a model, or one that
            returns a backend.
        repaired: the same piece without it.
        found_by: the property, row or promise of its kind's check that fails.
        cause: a part of the sentence in which the check names the cause.
        kind: of the piece, and so of the check: `check_loss`, `check_builder`, `check_model` or `check_backend`.
        options: of that check.
        shown: the pair whose source is printed, where that of ``broken`` and ``repaired`` does not show the defect.
    """

    name: str
    source: str
    harm: str
    broken: Callable[..., Any]
    repaired: Callable[..., Any]
    found_by: str
    cause: str
    kind: Kind = "loss"
    options: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[Any, Any] | None = None


def clean(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` where the mask is set, else 0."""
    return torch.where(mask.bool(), x, torch.zeros_like(x))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens of the mask; 0 of none."""
    return clean(values, mask).sum() / mask.sum().clamp(min=1)

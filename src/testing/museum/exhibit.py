"""One exhibit of the bug museum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Exhibit", "clean", "masked_mean"]


@final
@dataclass(frozen=True)
class Exhibit:
    """A defect that this field has had, in a few lines.

    Attributes:
        name: what it is called here.
        source: where it was seen: ``owner/repository#thread``, or what kind of code has it.
        broken: the loss with the defect.
        repaired: the same loss without it.
        found_by: the property that fails.
        cause: a part of the sentence that names the cause.
        options: of `check_loss`.
    """

    name: str
    source: str
    broken: Callable[..., Any]
    repaired: Callable[..., Any]
    found_by: str
    cause: str
    options: Mapping[str, Any] = field(default_factory=dict)


def clean(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` where the mask is set, else 0."""
    return torch.where(mask.bool(), x, torch.zeros_like(x))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens of the mask; 0 of none."""
    return clean(values, mask).sum() / mask.sum().clamp(min=1)
